"""Colors and markers of all figures."""

GREY = "#6b6b6b"
# Okabe and Ito's palette: distinguishable with every common color blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
