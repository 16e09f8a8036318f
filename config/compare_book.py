# As config/compare_python_longest.py, of a book, which has to be prepared under that name:
#   python prepare.py book --file=PATH && python compare.py config/compare_book.py
from config import compare_python_longest as _python

seeds, tokens, probe = [1337], _python.tokens, _python.probe
common = {**_python.common, 'dataset': 'book'}
_names = ('fold', 'fold with a queue', 'fold with a queue, without recurrence',
          'GPT, window 384, rotary')
runs = {name: _python.runs[name] for name in _names}
