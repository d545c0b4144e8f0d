#!/bin/sh
# mypyc calls the C field of an attribute `_real` `__real`, which is an operator of gcc: the class cannot be compiled.
set -eu
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m venv "$temporary/venv"
"$temporary/venv/bin/pip" install -qq --disable-pip-version-check mypy==2.4.1 setuptools
cd "$temporary"
cat >number.py <<'EOF'
class Number:
    def __init__(self, real: float) -> None:
        self._real = real

print(Number(1.0)._real)
EOF
PATH=$temporary/venv/bin:$PATH
python --version
mypy --version
cc --version | head -n 1
echo "interpreted: $(python -c 'import number')"
! mypyc number.py >said 2>&1 || { echo "compiled"; exit 1; }
grep -m 1 "before '\|before ‘" said
grep -q "__real" said
