"""configurator.py: precedence, value rules, help, and a one-line error for every bad input."""
import os
import subprocess
import sys

import pytest

from configurator import configure, numbers, show

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = '''"""Train a thing.

More words.
"""
import sys
from configurator import configure, show
# input and output
out_dir = 'out'     # where checkpoints go
data_file = ''      # what to read
# model
batch_size = 12     # rows of a batch,
                    # all of one length
# share of activations dropped
dropout = 0.1
compile = False     # "#" is no comment inside a string
name = 'a # b'
_hidden = 1         # not a key
config = configure(globals())
late = 1            # not a key either
batch_size = batch_size  # a later assignment
print(show(config))
'''


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Globals of a script in its own folder; the current directory is another one."""
    here = tmp_path / "here"
    (tmp_path / "script" / "config").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    return dict(__file__=str(tmp_path / "script" / "train.py"), __name__="__main__", os=os, helper=show, items=[1],
                _private=1, out_dir="out", data_file="", file="", note="n", batch_size=12, dropout=0.1, compile=False)


def error_of(call, *args, **kwargs):
    """The message of a SystemExit, checked for the form that every error has."""
    with pytest.raises(SystemExit) as caught:
        call(*args, **kwargs)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def write(folder, text, name="my.py"):
    path = os.path.join(folder, name)
    with open(path, "w") as stream:
        stream.write(text)
    return name


def test_keys_are_the_public_plain_values_of_the_namespace(settings):
    config = configure(settings, [])
    assert list(config) == ["out_dir", "data_file", "file", "note", "batch_size", "dropout", "compile"]
    assert config["batch_size"] == 12


@pytest.mark.parametrize("flag, value", [
    ("batch_size=4", 4), ("batch_size=-1", -1), ("batch_size=1_000", 1000), ("batch_size=1e4", 10000),
    ("batch_size=2000.0", 2000), ("batch_size=9007199254740993", 2 ** 53 + 1),
    ("dropout=1", 1.0), ("dropout=1e-3", 0.001), ("dropout=1e30", 1e30), ("dropout=inf", float("inf")),
    ("compile=True", True), ("compile=FALSE", False), ("compile=true", True),
    ("note=a=b", "a=b"), ("note=", ""), ("note= 3 ", " 3 "), ("note=x/y", "x/y"),
])
def test_flag_values(settings, flag, value):
    key = flag.partition("=")[0]
    config = configure(settings, [f"--{flag}"])
    assert config[key] == value and type(config[key]) is type(value)
    assert settings[key] is config[key]


@pytest.mark.parametrize("flag, words", [
    ("--batch_size=4.5", ["batch_size", "'4.5'", "integer", "12"]),
    ("--batch_size=", ["batch_size", "''", "integer"]),
    ("--batch_size=True", ["batch_size", "'True'", "integer"]),
    ("--batch_size=inf", ["integer"]), ("--batch_size=nan", ["integer"]), ("--batch_size=1e300", ["integer"]),
    ("--dropout=nan", ["dropout", "'nan'", "a number", "0.1"]), ("--dropout=x\ny", ["dropout", "a number"]),
    ("--dropout=" + "x" * 500, ["..."]),
    ("--compile=1", ["compile", "'1'", "True or False", "default False"]), ("--compile=yes", ["True or False"]),
    ("--batchsize=4", ["--batchsize", "did you mean --batch_size?"]),
    ("--batch-size=4", ["--batch-size", "did you mean --batch_size?"]),
    ("--zzz=4", ["--zzz", "--help"]), ("--=4", ["unknown"]), ("--_private=2", ["unknown"]), ("--items=2", ["unknown"]),
    ("--batch_size", ["--batch_size", "--key=value"]), ("--compile", ["--compile=True"]), ("--", ["unknown"]),
    ("batch_size=4", ["write --batch_size=4"]), ("-batch_size=4", ["write --batch_size=4"]),
    ("-b", ["'-b'", "--key=value"]), ("", ["not a .py file"]),
])
def test_bad_arguments(settings, flag, words):
    before = dict(settings)
    message = error_of(configure, settings, ["--note=x", flag])
    assert all(word in message for word in words), message
    assert len(message) < 300
    assert settings == before


@pytest.mark.parametrize("argv, shown", [
    (["--batch_size", "4"], "--batch_size=4"), (["--batch_size", "--note=x"], "--batch_size=VALUE"),
    (["--compile", "false"], "--compile=false"), (["--compile", "my.py"], "--compile=True"),
])
def test_value_after_a_space_is_shown_the_right_form(settings, argv, shown):
    assert error_of(configure, settings, argv).endswith(f"here {shown}")


def test_default_argv_is_the_command_line(settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=3"])
    assert configure(settings)["batch_size"] == 3


def test_the_last_of_two_flags_counts(settings):
    assert configure(settings, ["--note=a", "--note=b"])["note"] == "b"


def test_config_files_in_order_then_flags_wherever_they_stand(settings):
    write(".", "batch_size = 1\nnote = 'one'\ndropout = 0", "one.py")
    write(".", "batch_size = 2\nnote = 'two'", "two.py")
    config = configure(settings, ["--note=flag", "one.py", "two.py"])
    assert (config["batch_size"], config["note"], config["dropout"]) == (2, "flag", 0.0)
    assert type(config["dropout"]) is float
    assert configure(settings, ["two.py", "one.py"])["batch_size"] == 1


def test_config_file_may_compute_and_knows_its_path(settings):
    write(".", "import os, math\nfrom math import floor\n_n = 3\ndef double(x):\n    return 2 * x\nclass C: pass\n"
               "batch_size = double(_n) * 1.0\nnote = os.path.basename(__file__)")
    config = configure(settings, ["my.py"])
    assert config["batch_size"] == 6 and type(config["batch_size"]) is int and config["note"] == "my.py"
    assert "double" not in settings and "_n" not in settings


def test_config_file_does_not_see_the_script(settings):
    write(".", "note = str(batch_size)")
    assert "my.py:1: NameError" in error_of(configure, settings, ["my.py"])


def test_config_file_is_looked_up_here_first_then_beside_the_script(settings):
    beside = os.path.dirname(settings["__file__"])
    write(beside, "note = 'beside'", "config/my.py")
    assert configure(settings, ["config/my.py"])["note"] == "beside"
    os.mkdir("config")
    write(".", "note = 'here'", "config/my.py")
    assert configure(settings, ["config/my.py"])["note"] == "here"


@pytest.mark.parametrize("text, words", [
    ("batchsize = 3", ["my.py", "'batchsize'", "did you mean batch_size?"]),
    ("zzz = 3", ["'zzz'", "--help"]), ("steps = [1]", ["'steps'"]),
    ("batch_size = True", ["my.py", "batch_size=True", "an integer", "default 12"]),
    ("batch_size = '4'", ["batch_size='4'", "an integer"]), ("batch_size = 1.5", ["1.5"]),
    ("batch_size = 2 ** 63", ["an integer"]), ("batch_size = None", ["None"]),
    ("dropout = True", ["dropout=True", "a number"]), ("dropout = float('nan')", ["nan"]),
    ("dropout = 10 ** 400", ["a number"]), ("dropout = '0.1'", ["a number"]),
    ("compile = 1", ["compile=1", "True or False"]), ("compile = 'true'", ["True or False"]),
    ("note = 3", ["note=3", "text"]), ("import os as note", ["note=", "text"]),
    ("note = 'x'\nbatch_size = = 3", ["my.py:2:", "SyntaxError"]),
    ("note = 'x'\n\nbatch_size = 1 / 0", ["my.py:3:", "ZeroDivisionError"]),
    ("def f():\n    raise ValueError('a\\nb')\n\nf()", ["my.py:2:", "ValueError: a b"]),
    ("note = '1'\nimport json\njson.loads('{')", ["my.py:3:", "JSONDecodeError"]),
    ("note = '1'\n\ncompile('= =', 'other.py', 'exec')", ["my.py:3:", "SyntaxError"]),
    ("exit(0)", ["my.py:1:", "SystemExit"]), ("x = '\0'", ["my.py:", "null bytes"]),
])
def test_bad_config_files(settings, text, words):
    before = dict(settings)
    write(".", text)
    message = error_of(configure, settings, ["my.py"])
    assert all(word in message for word in words), message
    assert settings == before


@pytest.mark.parametrize("name, words", [
    ("config/shakespear.py", ["'config/shakespear.py' not found", "did you mean config/shakespeare.py?"]),
    ("shakespeare", ["not a .py file", "did you mean config/shakespeare.py?"]),
    ("qqq.py", ["'qqq.py' not found", "--key=value"]), ("folder.py", ["not found"]),
])
def test_missing_config_file(settings, name, words):
    write(os.path.dirname(settings["__file__"]), "", "config/shakespeare.py")
    os.mkdir("folder.py")
    message = error_of(configure, settings, [name])
    assert all(word in message for word in words), message


def test_missing_config_file_without_a_config_folder(settings):
    os.rmdir(os.path.join(os.path.dirname(settings["__file__"]), "config"))
    assert "not found" in error_of(configure, settings, ["x.py"])


def test_paths_given_as_flags_are_meant_from_the_current_directory(settings):
    config = configure(settings, ["--out_dir=x", "--data_file=../y", "--file=z", "--note=w"])
    here = os.getcwd()
    assert config["out_dir"] == os.path.join(here, "x")
    assert config["data_file"] == os.path.join(os.path.dirname(here), "y")
    assert (config["file"], config["note"]) == (os.path.join(here, "z"), "w")


def test_other_paths_stay_as_written(settings):
    write(".", "out_dir = 'there'")
    assert configure(dict(settings), ["my.py"])["out_dir"] == "there"
    assert configure(dict(settings), [])["out_dir"] == "out"
    assert configure(dict(settings), ["--out_dir="])["out_dir"] == ""
    assert configure(dict(settings), ["--out_dir=~/x"])["out_dir"] == os.path.expanduser("~/x")


def test_positional_key(settings):
    write(".", "note = 'config'")
    assert configure(dict(settings), ["text"], positional="note")["note"] == "text"
    assert configure(dict(settings), ["my.py"], positional="note")["note"] == "my.py"
    assert configure(dict(settings), ["text", "--note=flag"], positional="note")["note"] == "flag"
    assert "'b' is one argument too many" in error_of(configure, settings, ["a", "b"], positional="note")
    assert "--batch_size=3" in error_of(configure, settings, ["a", "batch_size=3"], positional="note")


def test_show_is_aligned():
    assert show({"a": 1, "long": "x", "b": 0.5}) == "a    = 1\nlong = 'x'\nb    = 0.5"
    assert show({}) == ""


def run_script(folder, *argv):
    write(folder, SCRIPT, "train.py")
    return subprocess.run([sys.executable, "train.py", *argv], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT})


HELP = '''usage: python train.py [config.py ...] [--key=value ...]
Train a thing.

input and output
  --out_dir='out'  where checkpoints go
  --data_file=''   what to read

model
  --batch_size=12  rows of a batch, all of one length
  --dropout=0.1    share of activations dropped
  --compile=False  "#" is no comment inside a string
  --name='a # b'
'''


@pytest.mark.parametrize("argv", [["--help"], ["--name=x", "-h"], ["nonsense", "--help"]])
def test_help(tmp_path, argv):
    done = run_script(tmp_path, *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == HELP


def test_help_with_a_positional_key_and_without_a_source(settings, capsys):
    with pytest.raises(SystemExit) as caught:
        configure(settings, ["-h"], positional="note")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python train.py NOTE [--key=value ...]\n") and "--batch_size=12" in out


def test_script_prints_its_settings_or_one_line_on_stderr(tmp_path):
    done = run_script(tmp_path, "--batch_size=3")
    assert done.returncode == 0 and "batch_size = 3\n" in done.stdout and "late" not in done.stdout
    done = run_script(tmp_path, "--late=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown key --late") and done.stderr.count("\n") == 1


def test_numbers_in_a_text():
    assert numbers('at', ' 48,12, 48,0') == [0, 12, 48] and numbers('at', '24', least=1, multiple=12) == [24]
    for text, how in (('', {}), ('12,x', {}), ('-12', {}), ('1.5', {}), ('0,12', dict(least=1)), ('12,20', dict(multiple=12))):
        assert "at must be whole numbers" in error_of(numbers, 'at', text, **how)


@pytest.mark.parametrize("end, words", [("raise KeyboardInterrupt", "stopped\n"), ("1 / 0", "ZeroDivisionError")])
def test_ctrl_c_ends_with_a_line_and_errors_as_ever(tmp_path, end, words):
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\nbatch = 1\nfrom configurator import configure\n"
                                        f"configure(globals())\n{end}\n")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert done.returncode and words in done.stderr and ("Traceback" in done.stderr) == ("Error" in words)
