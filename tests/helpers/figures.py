"""What tests ask of every figure."""

from matplotlib.figure import Figure


def check_legends(figure: Figure) -> None:
    """Fail unless the figure has a legend, and each legend lies inside the picture and beside the data."""
    figure.draw_without_rendering()  # which places everything
    title = figure.get_suptitle() or figure.axes[0].get_title()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    assert boxes, title
    assert all(figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes), title
    assert not any(box.overlaps(axes.get_window_extent()) for box in boxes for axes in figure.axes), title
