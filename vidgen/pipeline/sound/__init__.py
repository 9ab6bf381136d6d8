"""A clip's sound: the model's own, another model's, a file's, with speech over it."""
