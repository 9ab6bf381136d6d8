"""Films from a script: its text, its plan, its shots and the film."""
