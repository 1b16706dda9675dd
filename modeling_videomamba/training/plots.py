"""What draws."""

from typing import Any


def pyplot() -> Any:
    """matplotlib for files, without a screen. Raises `ImportError` where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
