"""Films from a script: what it says, what each shot takes, and the shots themselves."""
