"""`python -m eval.toybox`: clips of known scenes, judged and measured against the truth."""
