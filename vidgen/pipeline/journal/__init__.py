"""Kill and resume: what a running generation keeps, and how it goes on."""
