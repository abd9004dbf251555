"""Charts: Vega-Lite specifications made with Altair, and pictures of them.

One drawing library for pictures in files and for the report's page, which draws the same chart anew with
tooltips and in the reader's colours. So a chart names no colour of text or background.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 440, 280
"""Of the area that is drawn on, in pixels; the report makes it narrower on a small screen."""


def lines(
    rows: Rows, *, x: str, y: str, series: str | None = None, band: tuple[str, str] | None = None,
    x_title: str, y_title: str, log_x: bool = False, log_y: bool = False, dashed: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Lines through points, one a series, with a band around each.

    Args:
        rows: the points.
        x: the column of the numbers to the right.
        y: the column of the numbers upwards.
        series: the column that names the line; one line if None.
        band: the columns of a band's lower and upper edge.
        x_title: the axis, with its unit.
        y_title: the axis, with its unit.
        log_x: whether equal steps to the right are equal factors.
        log_y: whether equal steps upwards are.
        dashed: a column; its values are told apart by dashes.

    Returns:
        A Vega-Lite specification with the data in it.
    """
    import altair

    scale = altair.Scale(type="log" if log_x else "linear", zero=False, nice=False)
    shared: dict[str, Any] = {"x": altair.X(field=x, type="quantitative", title=x_title, scale=scale)}
    if series:
        names = list(dict.fromkeys(row[series] for row in rows))
        shared["color"] = altair.Color(field=series, type="nominal", title=None, sort=names)
    dashes = {"strokeDash": altair.StrokeDash(field=dashed, type="nominal", title=None)} if dashed else {}
    rising = altair.Scale(type="log") if log_y else altair.Scale(zero=False)
    up = altair.Y(field=y, type="quantitative", title=y_title, scale=rising)
    base = altair.Chart(_data(rows)).encode(**shared)
    tips = _tips(rows, series, x, y, *(band or ()))
    layers = [base.mark_line().encode(y=up, **dashes)]
    layers += [base.mark_point(filled=True, size=36).encode(y=up, tooltip=tips)]
    if band:
        edges = {
            "y": altair.Y(field=band[0], type="quantitative", title=y_title),
            "y2": altair.Y2(field=band[1]),
        }
        layers.insert(0, base.mark_area(opacity=0.15).encode(**edges))
    return _plain(altair.layer(*layers))


def points(
    rows: Rows, *, x: str, y: str, series: str, spread: tuple[str, str] | None = None,
    x_title: str, y_title: str, log_x: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Points, one a row, each with its spread as a bar upwards and downwards.

    Args: as for `lines`; `series` names each point, `spread` has the columns of the bar's ends.
    """
    import altair

    names = list(dict.fromkeys(row[series] for row in rows))
    scale = altair.Scale(type="log", nice=True) if log_x else altair.Scale(zero=False)
    base = altair.Chart(_data(rows)).encode(
        x=altair.X(field=x, type="quantitative", title=x_title, scale=scale),
        color=altair.Color(field=series, type="nominal", title=None, sort=names),
    )
    up = altair.Y(field=y, type="quantitative", title=y_title, scale=altair.Scale(zero=False))
    tips = _tips(rows, series, x, y, *(spread or ()))
    layers = [base.mark_point(filled=True, size=60).encode(y=up, tooltip=tips)]
    if spread:
        ends = {
            "y": altair.Y(field=spread[0], type="quantitative", title=y_title),
            "y2": altair.Y2(field=spread[1]),
        }
        layers.insert(0, base.mark_rule(strokeWidth=1.5).encode(**ends))
    return _plain(altair.layer(*layers))


def heat(
    rows: Rows, *, x: str, y: str, value: str, x_title: str, y_title: str, value_title: str,
    digits: int | None = None, from_zero: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A grid of coloured cells, in the order of the rows.

    Args:
        rows: the cells.
        x: the column of the names from left to right.
        y: the column of the names from top to bottom.
        value: the column that is the colour.
        x_title: the axis.
        y_title: the axis.
        value_title: of the legend, with its unit.
        digits: of fractions written into each cell; none are written if None.
        from_zero: whether the colours start at 0, so that small differences look small.
    """
    import altair

    base = altair.Chart(_data(rows)).encode(
        x=altair.X(field=x, type="ordinal", title=x_title, sort=list(dict.fromkeys(r[x] for r in rows))),
        y=altair.Y(field=y, type="ordinal", title=y_title, sort=list(dict.fromkeys(r[y] for r in rows))),
    )
    values = [row[value] for row in rows if row[value] is not None]
    least = 0.0 if from_zero else min(values, default=0.0)
    colour = altair.Color(
        field=value, type="quantitative", title=value_title,
        scale=altair.Scale(scheme="viridis", domain=[least, max(values, default=1.0)]),
    )  # fmt: skip
    cells = base.mark_rect().encode(color=colour, tooltip=_tips(rows, x, y, value))
    if digits is None:
        return _plain(cells)
    middle = (least + max(values, default=0.0)) / 2
    ink = altair.condition(altair.datum[value] < middle, altair.value("white"), altair.value("black"))
    text = altair.Text(field=value, type="quantitative", format=f".{digits}f")
    return _plain(altair.layer(cells, base.mark_text(fontSize=10).encode(text=text, color=ink)))


def bars(
    rows: Rows, *, x: str, y: str, series: str | None = None, x_title: str, y_title: str
) -> dict[str, Any]:
    """Bars upwards, one a row, those of one name side by side by series."""
    import altair

    names = list(dict.fromkeys(row[x] for row in rows))
    encoded: dict[str, Any] = {
        "x": altair.X(field=x, type="nominal", title=x_title, sort=names),
        "y": altair.Y(field=y, type="quantitative", title=y_title),
        "tooltip": _tips(rows, x, series, y),
    }
    if series:
        order = list(dict.fromkeys(row[series] for row in rows))
        encoded["xOffset"] = altair.XOffset(field=series, type="nominal", sort=order)
        encoded["color"] = altair.Color(field=series, type="nominal", title=None, sort=order)
    return _plain(altair.Chart(_data(rows)).mark_bar().encode(**encoded))


def svg(chart: Mapping[str, Any]) -> str:
    """The chart as a vector picture."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(dict(chart), config=_PAPER))


def png(chart: Mapping[str, Any]) -> bytes:
    """The chart as a picture of pixels, twice as many a side as the chart has."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(dict(chart), scale=2, config=_PAPER))


_PAPER = {"background": "white", "view": {"stroke": None}, "axis": {"gridOpacity": 0.5}}


def _data(rows: Rows) -> Any:
    import altair

    return altair.InlineData(values=[dict(row) for row in rows])


def _tips(rows: Rows, *names: str | None) -> list[Any]:
    """What is shown of a point under the pointer: its values by column."""
    import altair

    found = []
    for name in dict.fromkeys(name for name in names if name is not None):
        numeric = all(isinstance(row[name], int | float) for row in rows if row[name] is not None)
        form: dict[str, Any] = {"type": "nominal"}
        if numeric:
            form = {"type": "quantitative", "format": ",.4~g"}
        found.append(altair.Tooltip(field=name, title=name, **form))
    return found


def _plain(chart: Any) -> dict[str, Any]:
    """The specification as JSON has it, without Altair's own colours."""
    made = dict(chart.properties(width=WIDTH, height=HEIGHT).to_dict())
    made.pop("config", None)
    return made
