"""Tables and pictures of README.md and docs/, made from results/: `python -m lib.docs`.

Each is a block of a page. Its marker says what it shows; what follows up to the end is generated:

    <!-- table needle/fold_*.json; compare_bpe.json/parts
    where = {what} == recall
    seed = {settings/seed}
    @ 12 48 = {curves/recall/@/right} of {curves/recall/@/n} || not measured
    -->
    <!-- end -->

A row for each record for which `where` holds; `group = TEMPLATE` makes one row of those of which it
says the same: seeds. `rows = a; b` repeats the rows, with # for a and b. Each further line is a
column; one with @ stands for several. A template has fields {PATH}, {PATH|FORMAT} or
{FILE.json:PATH}: keys joined by /, a part of a record by its name, a point of a curve by its x.
Where a field is missing, what follows || is taken, or nothing. `lines`: any text with fields.
`picture FILE.png`: title, records, curve (a; b), label (@ is the curve), log = no, log_y = yes.
"""
import functools
import os
import re
import statistics
from glob import glob
from pathlib import Path

from lib.console import require
from lib.pictures import curves, digest
from lib.records import ROOT, load_record, metric

RESULTS = os.path.join(ROOT, 'results')
BLOCK = re.compile(r'(<!-- (table|lines|picture)\b(.*?)\n(.*?)-->\n).*?(<!-- end -->)', re.S)
FIELD = re.compile(r'{(?:([^{}|:]+[.]json):)?([^{}|]+)(?:[|]([^{}]*))?}')


def find(value, path):
    """What lies at a path in a record; of a metric or a point, its value; None if nothing does."""
    for key in filter(None, path.split('/')):
        if isinstance(value, list):
            value = {part['settings'].get('name'): part for part in value[::-1]}
        elif isinstance(value, dict) and 'points' in value:
            value = {str(point['x']): point for point in value['points']}
        value = value.get(key) if isinstance(value, dict) else None
    return value.get('value', value) if isinstance(value, dict) else value


def records(names):
    """The records that a block names, in order. Raises SystemExit if a name finds none."""
    found = []
    for file, path in (name.strip().split('.json') for name in names.split(';')):
        files = sorted(glob(f'{file}.json', root_dir=RESULTS))
        some = [find(load_record(os.path.join(RESULTS, name)), path) for name in files]
        require(some and None not in some, f'results/{file}.json has no record {path}')
        found += sum(some, []) if path == '/parts' else some
    return found


def merged(group):
    """Records of several seeds as one: the mean of the losses with their standard deviation, sd,
    and the medians of all else that is a number."""
    metrics = dict(group[0]['metrics'])
    for name in metrics:
        values = [record['metrics'].get(name, {}).get('value') for record in group]
        if len(values) > 1 and all(isinstance(value, (int, float)) for value in values):
            middle = statistics.mean if name == 'loss' else statistics.median
            metrics[name] = metric(middle(values), n=len(values), sd=statistics.stdev(values))
    return {**group[0], 'metrics': metrics}


def fill(template, record):
    """The first alternative of a template whose fields are all there; '' if there is none."""
    for text in template.split('||'):
        values = [find(load_record(os.path.join(RESULTS, file)) if file else record, path)
                  for file, path, _ in FIELD.findall(text)]
        if not any(value is None for value in values):
            return FIELD.sub(lambda match: format(values.pop(0), match[3] or ''), text).strip()
    return ''


def table(names, given):
    """A table in Markdown. Raises SystemExit if one of its columns stays empty."""
    left, right = given.pop('where', '==').split('==')
    group, each, columns, groups = given.pop('group', ''), given.pop('rows', ''), {}, {}
    for title, template in given.items():
        for x in title[2:].split() if title.startswith('@ ') else [title]:
            columns[f'{int(x):,}' if x.isdigit() else x] = template.replace('@', x)
    for i, record in enumerate(records(names)):
        if fill(left, record) == right.strip():
            groups.setdefault(fill(group, record) if group else i, []).append(record)
    rows = [[fill(template.replace('#', value.strip()), record) for template in columns.values()]
            for value in each.split(';') for record in map(merged, groups.values())]
    for title, *cells in zip(columns, *rows):
        require(any(cells), f'{names}: no record has anything for {title!r}')
    lines = [[*columns], ['---'] * len(columns), *rows]
    return ''.join('| ' + ' | '.join(cells) + ' |\n' for cells in lines)


def make(page, pictures, match):
    """A block with its content made anew; what its picture shows is added to `pictures`."""
    marker, kind, head, body, end = match.groups()
    if kind == 'lines':
        lines = [fill(line, {}) for line in body.splitlines()]
        require(all(lines), f'{page}: a field is missing in {body}')
        return marker + '\n'.join([*lines, end])
    given = dict(re.split(r'\s+=\s+', line.strip(), maxsplit=1) for line in body.splitlines())
    if kind == 'table':
        return marker + table(head.strip(), given) + end
    shown = {fill(given['label'].replace('@', name), record): record['curves'][name]
             for record in records(given['records'])
             for name in re.split(r'\s*;\s*', given['curve'])}
    path = os.path.join(RESULTS, head.strip())
    pictures[path] = given['title'], shown, 'log' not in given, 'log_y' in given
    path = os.path.relpath(path, os.path.dirname(page)).replace(os.sep, '/')
    return marker + f'![{given["title"]}]({path})\n' + end


def stale():
    """What is not as results/ has it: ({page: its text}, {path of a picture: what it shows})."""
    texts, pictures = {}, {}
    for page in [os.path.join(ROOT, 'README.md'), *glob(os.path.join(ROOT, 'docs', '*.md'))]:
        old = Path(page).read_text('utf-8')
        new = BLOCK.sub(functools.partial(make, page, pictures), old)
        texts.update({page: new} if new != old else {})
    for path, shown in [*pictures.items()]:
        if os.path.exists(path) and digest(*shown).encode() in Path(path).read_bytes():
            del pictures[path]
    return texts, pictures


if __name__ == '__main__':
    texts, pictures = stale()
    for page, text in texts.items():
        Path(page).write_text(text, 'utf-8')
    for path, shown in pictures.items():
        curves(path, *shown)
    print('made anew:', *(os.path.relpath(path, ROOT) for path in [*texts, *pictures]))
