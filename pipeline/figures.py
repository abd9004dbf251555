"""Charts: Vega-Lite specifications made with Altair, and pictures of them.

One drawing library for pictures in files and for the report's page, which draws the same chart anew with
tooltips and in the reader's colours. So a chart names no colour of text or background; `theme` has what
both share. Series differ in shape as well as in colour.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Rows = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 440, 280
"""Of the area that is drawn on, in pixels; the report makes it narrower on a small screen."""

# Okabe and Ito's colours, told apart by every kind of colour vision; yellow and black, which vanish on a
# white or a black page, are replaced, and two are added for the tenth fusion.
_COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#8C6D31",
    "#7F7F7F",
    "#9467BD",
]
_COLOURS += ["#B5A000"]

_GRID = {"gridColor": "#888888", "gridOpacity": 0.3}
_TEXT = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}


def theme(ink: str) -> dict[str, Any]:
    """Vega-Lite's settings of a page and of a picture alike.

    Args:
        ink: the colour of text and lines; ``currentColor`` takes that of the page.
    """
    marked = {"labelColor": ink, "titleColor": ink, **_TEXT}
    return {
        "font": "Liberation Sans, Arial, Helvetica, sans-serif",
        "background": None,
        "view": {"stroke": None},
        "axis": {"domain": False, "domainColor": ink, "tickColor": ink, "tickSize": 4, "titlePadding": 8,
                 **_GRID, **marked},
        "axisX": {"grid": False, "domain": True, "labelOverlap": True},
        "axisYQuantitative": {"titleAnchor": "end", "tickCount": 6},
        "legend": {"symbolSize": 70, "labelLimit": 260, "rowPadding": 4, **marked},
        "title": {"anchor": "start", "fontSize": 13, "offset": 12, "color": ink},
        "mark": {"color": _COLOURS[0]},
        "rule": {"color": ink},
        "range": {"category": _COLOURS, "heatmap": {"scheme": "viridis"}, "ramp": {"scheme": "viridis"}},
    }  # fmt: skip


PAPER = {**theme("#1a1a1a"), "background": "white", "padding": 10}
"""The settings of a picture in a file."""


def lines(
    rows: Rows, *, x: str, y: str, series: str | None = None, band: tuple[str, str] | None = None,
    x_title: str, y_title: str, log_x: bool = False, log_y: bool = False, dashed: str | None = None,
    tips: Sequence[str] = (),
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
        tips: further columns that are shown of a point under the pointer.

    Returns:
        A Vega-Lite specification with the data in it.
    """
    import altair

    base = altair.Chart(_data(rows)).encode(x=_across(rows, x, x_title, log_x))
    plain = _colour(rows, series)
    shown = _tips(rows, *tips, series, dashed, x, y, *(band or ()))
    dashes = {}
    if dashed:  # its names are sentences, so none stands beside another where the page is narrow
        legend = altair.Legend(title=None, columns=1, labelLimit=260)
        dashes = {"strokeDash": altair.StrokeDash(field=dashed, type="nominal", legend=legend)}
    up = _up(y, y_title, rows if log_y else ())
    layers = [base.mark_line(strokeWidth=2).encode(y=up, **dashes, **plain)]
    marks = base.mark_point(filled=True, size=45, opacity=1)
    layers += [marks.encode(y=up, tooltip=shown, **_marked(rows, series))]
    if band:
        edges = {"y": _up(band[0], y_title), "y2": altair.Y2(field=band[1])}
        layers.insert(0, base.mark_area(opacity=0.18).encode(**edges, **plain))
    return _plain(altair.layer(*layers))


def points(
    rows: Rows, *, x: str, y: str, series: str, spread: tuple[str, str] | None = None,
    x_title: str, y_title: str, log_x: bool = False, tips: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Points, one a row, each with its spread as a bar upwards and downwards.

    Args: as for `lines`; `series` names each point, `spread` has the columns of the bar's ends, `tips` are
        further columns that are shown of a point under the pointer.
    """
    import altair

    base = altair.Chart(_data(rows)).encode(x=_across(rows, x, x_title, log_x))
    plain = _colour(rows, series)
    shown = _tips(rows, *tips, series, x, y, *(spread or ()))
    marks = base.mark_point(filled=True, size=80, opacity=0.9)
    layers = [marks.encode(y=_up(y, y_title), tooltip=shown, **_marked(rows, series))]
    if spread:
        ends = {"y": _up(spread[0], y_title), "y2": altair.Y2(field=spread[1])}
        layers.insert(0, base.mark_rule(strokeWidth=1.5).encode(**ends, **plain))
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

    columns, lines_ = _names(rows, x), _names(rows, y)
    size = {"width": _between(160, 36 * len(columns), 760), "height": _between(90, 24 * len(lines_), 760)}
    axis = _named_axis(columns, size["width"])
    base = altair.Chart(_data(rows)).encode(
        x=altair.X(field=x, type="ordinal", title=x_title, sort=columns, axis=axis),
        y=altair.Y(field=y, type="ordinal", title=y_title, sort=lines_),
    )
    values = [row[value] for row in rows if row[value] is not None]
    least = 0.0 if from_zero else min(values, default=0.0)
    reach = altair.Scale(domain=[least, max(values, default=1.0)])
    colour = altair.Color(field=value, type="quantitative", title=value_title, scale=reach)
    cells = base.mark_rect().encode(color=colour, tooltip=_tips(rows, x, y, value))
    if digits is None:
        return _plain(cells, **size)
    middle = (least + max(values, default=0.0)) / 2
    ink = altair.condition(altair.datum[value] < middle, altair.value("white"), altair.value("black"))
    text = altair.Text(field=value, type="quantitative", format=f".{digits}f")
    return _plain(altair.layer(cells, base.mark_text(fontSize=10).encode(text=text, color=ink)), **size)


def bars(
    rows: Rows, *, x: str, y: str, series: str | None = None, spread: tuple[str, str] | None = None,
    x_title: str, y_title: str,
) -> dict[str, Any]:  # fmt: skip
    """Bars upwards, one a row, those of one name side by side by series.

    Args: as for `points`; `x` names the bars.
    """
    import altair

    names = _names(rows, x)
    where: dict[str, Any] = {
        "x": altair.X(field=x, type="nominal", title=x_title, sort=names, axis=_named_axis(names))
    }
    if series:
        where["xOffset"] = altair.XOffset(field=series, type="nominal", sort=_names(rows, series))
    base = altair.Chart(_data(rows)).encode(**where)
    up = altair.Y(field=y, type="quantitative", title=y_title)
    tips = _tips(rows, x, series, y, *(spread or ()))
    layers = [base.mark_bar().encode(y=up, tooltip=tips, **_colour(rows, series))]
    if spread:
        ends = {
            "y": altair.Y(field=spread[0], type="quantitative", title=y_title),
            "y2": altair.Y2(field=spread[1]),
        }
        layers.append(base.mark_rule(strokeWidth=1.5).encode(**ends))
    return _plain(altair.layer(*layers), width=_between(WIDTH, 16 * len(rows), 760))


def svg(chart: Mapping[str, Any], title: str = "") -> str:
    """The chart as a vector picture, with a title if there is one."""
    import vl_convert

    titled = {**chart, "title": title} if title else dict(chart)
    return str(vl_convert.vegalite_to_svg(titled, config=PAPER))


def png(picture: str) -> bytes:
    """What `svg` drew as a picture of pixels, twice as many a side as the chart has."""
    import vl_convert

    return bytes(vl_convert.svg_to_png(picture, scale=2))


def _sizes(seen: Sequence[int | float]) -> list[int | float]:
    """Few whole numbers that stand well apart, such as 8, 16, 32: what an axis names. None of others.

    >>> _sizes([32, 8, 16, 8]), _sizes([1000, 1001]), _sizes([0.5, 2])
    ([8, 16, 32], [], [])
    """
    sizes = sorted(set(seen))
    apart = all(larger >= 1.4 * smaller for smaller, larger in pairwise(sizes))
    whole = all(isinstance(size, int) for size in sizes)
    return sizes if whole and apart and 1 < len(sizes) <= 8 else []


def _across(rows: Rows, x: str, title: str, log: bool) -> Any:
    import altair

    if not log:
        whole = all(isinstance(row[x], int) for row in rows)
        marks: dict[str, Any] = {"tickMinStep": 1} if whole else {}
        scale = altair.Scale(zero=False, nice=False, padding=12)
        return altair.X(field=x, type="quantitative", title=title, scale=scale, axis=altair.Axis(**marks))
    return altair.X(field=x, type="quantitative", title=title, **_logarithmic(rows, x))


def _logarithmic(rows: Rows, column: str) -> dict[str, Any]:
    """Scale and axis of equal steps for equal factors: as far as the values reach, few numbers named."""
    import altair

    seen = [row[column] for row in rows if row[column] is not None and row[column] > 0]
    low, high = (min(seen), max(seen)) if seen else (1, 10)
    beside = max(1.15, (high / low) ** 0.06)
    low, high = low / beside, high * beside
    ticks = _sizes(seen) or log_ticks(low, high)
    short = high >= 1000 and low >= 1  # 20k; but half a minute is not 500m
    return {
        "scale": altair.Scale(type="log", domain=[low, high], nice=False),
        "axis": altair.Axis(values=ticks, format="~s" if short else "~g"),
    }


def log_ticks(low: int | float, high: int | float) -> list[int | float]:
    """Round numbers between two: powers of ten, or more of each decade where those are few.

    >>> log_ticks(70, 20_000), log_ticks(70, 1200), log_ticks(40, 95)
    ([100, 1000, 10000], [100, 200, 500, 1000], [40, 60, 80])
    """
    if high / low < 3:  # an axis with hardly a bend
        step = next(s for k in range(-12, 12) for s in _decade(k, (1, 2, 5)) if (high - low) / s < 5)
        return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks: list[int | float] = []
    for digits in ((1,), (1, 2, 5)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for power in powers for tick in _decade(power, digits) if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _decade(power: int, digits: Sequence[int]) -> list[int | float]:
    return [digit * 10**power if power >= 0 else digit / 10**-power for digit in digits]


def _up(y: str, title: str, log: Rows = ()) -> Any:
    """An axis upwards, logarithmic where it gets the rows."""
    import altair

    scales = _logarithmic(log, y) if log else {"scale": altair.Scale(zero=False)}
    return altair.Y(field=y, type="quantitative", title=title, **scales)


def _colour(rows: Rows, series: str | None) -> dict[str, Any]:
    import altair

    return (
        {}
        if series is None
        else {"color": altair.Color(**_series(rows, series), legend=altair.Legend(symbolOpacity=1))}
    )


def _marked(rows: Rows, series: str | None) -> dict[str, Any]:
    """Colour and shape together."""
    import altair

    if series is None:
        return {}
    return {**_colour(rows, series), "shape": altair.Shape(**_series(rows, series))}


def _series(rows: Rows, series: str) -> dict[str, Any]:
    """Of colour and shape alike: only where the domains are written out do their legends become one."""
    import altair

    names = _names(rows, series)
    return {"field": series, "type": "nominal", "title": None, "scale": altair.Scale(domain=names)}


def _names(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _named_axis(names: Sequence[Any], width: int = 360) -> Any:
    """Names below a chart of that width: level where all are short, else slanted."""
    import altair

    room = width / max(1, len(names))  # pixels of each name
    level = max((len(str(name)) for name in names), default=0) * 6 < room
    return altair.Axis(labelAngle=0 if level else -40, labelLimit=160, labelOverlap=False)


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


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


def _plain(chart: Any, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
    """The specification as JSON has it, without Altair's own colours."""
    made = dict(chart.properties(width=width, height=height).to_dict())
    made.pop("config", None)
    return made
