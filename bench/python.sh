# shellcheck shell=bash
# Sourced by the run scripts, in the repository: `find_python MODULES` sets PYTHON to an interpreter
# that has them, which it makes in .venv where there is none, with the files of `requirements`.
# While that lasts there is a .venv.partial: where one is found, .venv is half made, and made anew.

requirements=(requirements.txt)

# What cannot be said ends nothing.
say() { echo "$@" 2>/dev/null || :; }

fail() { # line
  say "$0: error: $1" >&2
  exit 2
}

can_import() { # interpreter, modules: whether it has each, and whole
  "$1" - "${@:2}" >/dev/null 2>&1 <<'PYTHON_END'
import importlib.metadata, importlib.util, sys
OTHER_NAMES = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}
def is_whole(name):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # to Python an empty folder is a package
        return False
    try:
        # What pip, conda and uv write last. Importing for real takes seconds.
        if importlib.metadata.distribution(OTHER_NAMES.get(name, name)).read_text("INSTALLER"):
            return True
    except importlib.metadata.PackageNotFoundError:
        pass
    importlib.import_module(name)
    return True
sys.exit(sys.version_info < (3, 11) or not all(map(is_whole, sys.argv[1:])))
PYTHON_END
}

imports() { # interpreter, modules: whether it really does; seconds
  "$1" -c 'import importlib, sys
sys.exit(any(importlib.import_module(name).__file__ is None for name in sys.argv[1:]))' "${@:2}" >/dev/null 2>&1
}

pip_install() { # flags
  if "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; then return; fi
  fail "pip could not install into .venv; or name by PYTHON an interpreter that has requirements.txt"
}

find_python() { # modules
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if can_import "$PYTHON" "$@"; then return; fi
    fail "PYTHON=$PYTHON cannot import all of: $*; install requirements.txt there"
  fi
  for candidate in python3 python; do
    if can_import "$candidate" "$@"; then
      PYTHON="$candidate"
      return
    fi
  done
  PYTHON=.venv/bin/python
  if [ -e .venv.partial ] || ! can_import "$PYTHON" "$@"; then make_venv "$@"; fi
}

make_venv() { # modules
  local base file said="" clear="" files=()
  for base in python3 python ""; do
    if [ -n "$base" ] && can_import "$base"; then break; fi
  done
  if [ -z "$base" ]; then fail "no Python 3.11 or newer here; install one, or name it by PYTHON"; fi
  exec 9<. # two first starts at once: one installs, the other waits
  "$base" - <<'PYTHON_END'
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another start that installs into .venv", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
PYTHON_END
  if [ ! -e .venv.partial ] && can_import "$PYTHON" "$@"; then
    exec 9<&-
    return
  fi
  if [ -e .venv.partial ]; then
    clear=--clear
    say ".venv was left half made: making it anew"
  elif [ -e .venv/pyvenv.cfg ] && ! "$PYTHON" -c "" 2>/dev/null; then
    clear=--clear
    say "the Python of .venv is gone: making .venv anew"
  elif [ -e .venv/pyvenv.cfg ]; then
    can_import "$PYTHON" || fail "the Python of .venv is older than 3.11; delete .venv, or name another by PYTHON"
  elif [ -n "$(ls -A .venv 2>/dev/null)" ]; then
    fail ".venv is no virtual environment; move it away, or name an interpreter by PYTHON"
  fi
  say "No Python with $* here: installing ${requirements[*]} into .venv (about 1.5 GB; minutes)"
  # One that works stays: what else is in it is not ours.
  if [ -n "$clear" ] || [ ! -e .venv/pyvenv.cfg ]; then
    : >.venv.partial
    if ! said="$("$base" -m venv ${clear:+"$clear"} .venv 2>&1)"; then
      said="$(printf %s "$said" | tr -s '\n' ' ' | cut -c 1-200)"
      fail "$base -m venv .venv failed (on Debian it needs python3-venv): $said"
    fi
  fi
  for file in "${requirements[@]}"; do files+=(-r "$file"); done
  pip_install "${files[@]}"
  if ! imports "$PYTHON" "$@"; then # pip takes half a package for a whole one
    say "not all in .venv is whole: installing it again"
    pip_install --force-reinstall "${files[@]}"
    imports "$PYTHON" "$@" || fail ".venv cannot be mended; delete it, and start again"
  fi
  rm -f .venv.partial
  exec 9<&-
}
