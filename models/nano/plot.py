"""A line chart as SVG, without a plotting library."""

from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 45
COLORS = ("#4c72b0", "#dd8452", "#55a868")


def _ticks(low: float, high: float, step: float) -> list[float]:
    first = -(-low // step)
    return [round((first + k) * step, 10) for k in range(int((high - first * step) / step) + 1)]


def line_chart(
    series: Mapping[str, Points], title: str, x_label: str, x_step: float, y_range: tuple[float, float], y_step: float
) -> str:
    """SVG text. The x axis starts at zero; points above the y range are cut off."""
    x_max = max(x for points in series.values() for x, _ in points)
    y_low, y_high = y_range

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / x_max, (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<style>text { font-size: 12px }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">{title}</text>',
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
    ]
    for value in _ticks(y_low, y_high, y_step):
        _, y = place(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(0, x_max, x_step):
        x, y = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:g}</text>')
    for number, (name, points) in enumerate(series.items()):
        color, key_y = COLORS[number], TOP + 14 + 18 * number
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points if y <= y_high)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<path d="M{WIDTH - 190} {key_y - 4}h24" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 160}" y="{key_y}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])
