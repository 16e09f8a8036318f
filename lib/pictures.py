"""Pictures of curves that records hold."""
import hashlib
import json
import math

from lib.console import say
from lib.files import write_file

def digest(*content):
    """A text that names what a picture shows; the picture carries it (curves)."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

def curves(path, title, drawn, log=True, log_y=False):
    """Draw curves of records, {label: curve}, with error bars where points have low and high; log:
    the x axis is logarithmic, but linear up to the first x above 0, so that 0 has a place. Without
    matplotlib a line says that there is no picture."""
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # it is missing, or its settings are odd
        say(f'{path} is not drawn: {error}')
        return
    figure = Figure(figsize=(8, 4.5), layout='tight')
    ax, measured = figure.subplots(), set()
    for label, curve in drawn.items():
        points = [point for point in curve['points'] if point['value'] is not None]
        x, y = ([point[key] for point in points] for key in ('x', 'value'))
        errors = [[abs(point.get(key, point['value']) - point['value']) for point in points]
                  for key in ('low', 'high')]
        ax.errorbar(x, y, errors, fmt='o-', ms=3, lw=1.2, elinewidth=0.8, label=label)
        measured.update(x)
        ax.set(xlabel=curve['x'], ylabel=curve['y'])
    scale = min((x for x in measured if x > 0), default=1) if log else None
    if log:
        ax.set_xscale('symlog', linthresh=scale, linscale=0.4)
    if log_y:
        ax.set_yscale('log')
    if len(measured) < 40:  # else there is a point almost everywhere
        place = {x: math.asinh(x / scale) if scale else x for x in sorted(measured)}
        width, shown = max(place.values(), default=0) - min(place.values(), default=0), []
        for x in place:
            if not shown or place[x] - place[shown[-1]] >= width / 25:
                shown.append(x)
        ax.set_xticks(shown, [f'{x:,}' for x in shown], rotation=45, fontsize=8)
        ax.set_xticks([], minor=True)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    about = {'Source': digest(title, drawn, log, log_y)}
    write_file(path, lambda f: figure.savefig(f, dpi=110, format='png', metadata=about))
