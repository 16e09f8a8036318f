# Learning rates of config/compare_python.py: python compare.py config/search_python.py
# Five for each side, on the last tenth of the training split, which these runs do not see.
from config import compare_python as _file

seeds, tokens, common = [1337], _file.tokens, {'set_aside': 0.1}
runs = {f'{name}, {rate:g}': {**_file.runs[name], 'learning_rate': rate, 'min_lr': rate / 50}
        for rate in (4e-3, 2e-3, 6e-3, 8e-3, 1.2e-2)
        for name in ('fold', 'sliding window of 12', 'GPT, window 12')}
