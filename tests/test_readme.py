"""Figures in the README's tables are those of the files under results/ that it names."""
import json
import os

import pytest

from conftest import ROOT


def text():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        return f.read()


def result(name):
    with open(os.path.join(ROOT, 'results', name)) as f:
        return json.load(f)


def test_side_by_side():
    for m in result('compare_shakespeare_short/report.json')['models']:
        row = f"| {m['name']} | {m['loss']:.4f} ± {m['sd']:.4f} | {m['tokens_per_s']:,.0f} | {m['flops_per_token']:,.0f} |"
        assert row in text()


@pytest.mark.parametrize('seed', range(1337, 1342))
def test_needle(seed):
    rows = result(f'needle/fold_gated_{seed}.json')['recall']
    assert f"| symbols, {seed} | " + ' | '.join(f"{row['right']} of {row['sequences']}" for row in rows) + ' |' in text()


def test_plain_needle():
    rows = result('needle/fold_plain_1337.json')['recall']
    words = ' '.join(text().split())
    near = [str(row['right']) for row in rows[:-1]]
    assert f"{', '.join(near[:-1])} and {near[-1]} of 200 keys" in words and f"{rows[-1]['right']} of 100 at 1,000,000" in words


def test_generation():
    for row in result('generation.json')['table']:
        if row['model'] == 'fold':
            assert f"| {row['context']:,} | {row['tokens_per_s']:,.0f} | {row['state_bytes']:,} |" in text()
