"""Where the letters lie on a keyboard."""

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    near = {letter: "" for row in _ROWS for letter in row}
    for r, row in enumerate(_ROWS):
        for c, letter in enumerate(row):
            beside = row[max(0, c - 1) : c] + row[c + 1 : c + 2]
            above = _ROWS[r - 1][c : c + 2] if r else ""
            below = _ROWS[r + 1][max(0, c - 1) : c + 1] if r < len(_ROWS) - 1 else ""
            near[letter] = beside + above + below
    return near


NEIGHBOURS = _neighbours()
"""Letters that lie beside, above or below each of them."""
