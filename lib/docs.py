"""Tables and pictures of README.md and docs/, made from results/: `python -m lib.docs`.

Each is a block of a page. Its marker says what it shows; what follows up to the end is generated:

    <!-- table needle/fold_*.json; compare_shakespeare.json/parts
    where = {what} == recall
    seed = {settings/seed}
    @ 12 48 = {curves/recall/@/right} of {curves/recall/@/n} || not measured
    -->
    <!-- end -->

A row for each record for which `where` holds; `group = TEMPLATE` makes one row of those of which it
says the same: seeds. `rows = a; b` repeats the rows, with # for a and b. Each further line is a
column; one with @ stands for several. A template has fields {PATH}, {PATH|FORMAT} or
{FILE.json:PATH}: keys joined by /, a part of a record by its name, a point of a curve by its x.
Where a field is missing, what follows || is taken, or nothing. Of FILE.json? all may be missing.
`lines`: any text with fields.
`picture FILE.png`: title, records, curve (a; b), label (@ is the curve), log_y = yes. Curves of one
label are shown as their mean.
"""
import lib.start  # noqa: F401 (before torch)
import os
import re
import statistics
from functools import partial
from itertools import product
from pathlib import Path

from lib.console import require, say
from lib.files import write_file
from lib.pictures import curves, digest
from lib.records import ROOT, load_record, metric

RESULTS = Path(ROOT, 'results')
BLOCK = re.compile(r'(<!-- (table|lines|picture)\b(.*?)\n(.*?)-->\n).*?(<!-- end -->)', re.S)
FIELD = re.compile(r'{(?:([^{}|:]+[.]json):)?([^{}|]+)(?:[|]([^{}]*))?}')

def find(value, path):
    """What lies at a path in a record; of a metric or a point, its value; None if nothing does."""
    for key in filter(None, path.split('/')):
        if isinstance(value, list):
            value = {part['settings'].get('name'): part for part in reversed(value)}  # the first
        elif isinstance(value, dict) and 'points' in value:
            value = {str(point['x']): point for point in value['points']}
        value = value.get(key) if isinstance(value, dict) else None
    return value.get('value', value) if isinstance(value, dict) else value

def records(names):
    """The records that a block names, in order. Raises SystemExit if a name finds none."""
    found = []
    for file, path in (name.strip().split('.json') for name in names.split(';')):
        paths, absent = sorted(RESULTS.glob(f'{file}.json')), [{'metrics': {}}] * (path == '?')
        some = [find(load_record(each), path.strip('?')) for each in paths] or absent
        require(some and None not in some, f'results/{file}.json has no record {path}')
        found += sum(some, []) if path == '/parts' else some
    return found

def merged(group):
    """Records of several seeds as one: the mean of the losses with their standard deviation, sd,
    the medians of all else that is a number, and the means of the curves."""
    metrics, curves = dict(group[0]['metrics']), dict(group[0].get('curves', {}))
    for name in metrics:
        values = [record['metrics'].get(name, {}).get('value') for record in group]
        if len(values) > 1 and all(isinstance(value, (int, float)) for value in values):
            middle = statistics.mean if name == 'loss' else statistics.median
            metrics[name] = metric(middle(values), n=len(values), sd=statistics.stdev(values))
    for name, curve in curves.items() if len(group) > 1 else ():
        each = [(x, [find(record, f'curves/{name}/{x}') for record in group])
                for x in (point['x'] for point in curve['points'])]
        points = [{'x': x, 'value': statistics.mean(values)} for x, values in each
                  if None not in values]
        curves[name] = {**curve, 'points': points}
    return {**group[0], 'metrics': metrics, 'curves': curves}

def fill(template, record):
    """The first alternative of a template whose fields are all there; '' if there is none."""
    for text in template.split('||'):
        values = [find(load_record(RESULTS / file) if file else record, path)
                  for file, path, _ in FIELD.findall(text)]
        if None not in values:
            return FIELD.sub(lambda match: format(values.pop(0), match[3] or ''), text).strip()
    return ''

def markdown(titles, rows):
    """A table of texts in Markdown."""
    return '\n'.join(f"| {' | '.join(cells)} |" for cells in (titles, ['---'] * len(titles), *rows))

def table(names, given):
    """A table in Markdown. Raises SystemExit if one of its columns stays empty."""
    left, right = given.pop('where', '==').split('==')  # without: '' == ''
    group, each, columns, groups = given.pop('group', ''), given.pop('rows', ''), {}, {}
    for title, template in given.items():
        for x in title[2:].split() if title.startswith('@ ') else [title]:
            columns[f'{int(x):,}' if x.isdigit() else x] = template.replace('@', x)
    for i, record in enumerate(records(names)):
        if fill(left, record) == right.strip():
            groups.setdefault(fill(group, record) or i, []).append(record)
    rows = [[fill(template.replace('#', value.strip()), record) for template in columns.values()]
            for value in each.split(';') for record in map(merged, groups.values())]
    for title, *cells in zip(columns, *rows):
        require(any(cells), f'{names}: no record has anything for {title!r}')
    return markdown([*columns], rows)

def make(page, pictures, match):
    """A block with its content made anew; what its picture shows is added to `pictures`."""
    marker, kind, head, body, end = match.groups()
    if kind == 'lines':
        lines = [fill(line, {}) for line in body.splitlines()]
        require(all(lines), f'{page}: a field is missing in {body}')
        return marker + '\n'.join([*lines, end])
    given = dict(re.split(r'\s+=\s+', line.strip(), maxsplit=1) for line in body.splitlines())
    if kind == 'table':
        return f'{marker}{table(head.strip(), given)}\n{end}'
    path, groups = RESULTS / head.strip(), {}
    for record, name in product(records(given['records']), given['curve'].split('; ')):
        label = fill(given['label'].replace('@', name), record)
        groups.setdefault((label, name), []).append(record)
    shown = {label: merged(group)['curves'][name] for (label, name), group in groups.items()}
    pictures[path] = given['title'], shown, True, given.get('log_y') == 'yes'
    path = Path(os.path.relpath(path, page.parent)).as_posix()
    return f'{marker}![{given["title"]}]({path})\n{end}'

def stale():
    """{path: function that makes it anew} of pages and pictures that are not as results/ has it."""
    found, pictures = {}, {}
    for page in [Path(ROOT, 'README.md'), *Path(ROOT, 'docs').glob('*.md')]:
        old = page.read_text('utf-8')
        new = BLOCK.sub(partial(make, page, pictures), old)
        if new != old:
            found[page] = partial(write_file, page, lambda f, new=new: f.write(new.encode()))
    for path, shown in pictures.items():
        if not path.exists() or digest(*shown).encode() not in path.read_bytes():
            found[path] = partial(curves, path, *shown)
    return found

if __name__ == '__main__':
    for path, make_anew in stale().items():
        make_anew()
        say(f'made anew: {os.path.relpath(path, ROOT)}')
