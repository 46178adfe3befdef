#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set
# that this machine has: the operator tests, and some thousand drawn calls against the reference.
#
#   runs/sanitizers.sh [DIR]     DIR: where the instrumented copy is built and kept
#                                (default: build/sanitizers)
#
# Ends with 1 at the first report. Leaks are not looked for: Python keeps much until it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
tree=$(realpath -m "${1:-build/sanitizers}")

tests=(tests/test_ops.py tests/test_cpu_kernels.py tests/test_masked_update.py
  tests/test_drawn_ops.py)
# Left out: tests that compile, trace or start another process, and the one that compares bits with
# torch's own update (another compilation contracts other products).
selected="not opcheck and not compiles and not every_instruction_set and not capability"
selected="$selected and not fused and not 32_bits"

# A copy: the checkout's own library stays what it is. Unchanged files keep their time, so that only
# what has changed is compiled again.
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$tree"
cd "$tree"
# Half the time to compile, and lines in the reports.
sed -i 's/"-O3"/"-O1"/; s/"-g0"/"-g1"/' setup.py
checks=address,undefined,float-cast-overflow
flags="-fsanitize=$checks -fno-sanitize-recover=all -fno-omit-frame-pointer"
echo "== building in $tree"
CFLAGS=$flags CXXFLAGS=$flags LDFLAGS="-fsanitize=$checks" SSAH_CUDA=0 MAX_JOBS="${MAX_JOBS:-2}" \
  "$python" setup.py --quiet build_ext --inplace

# The interpreter is not instrumented: the runtimes have to be there before it.
library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }
preload=$(library asan):$(library ubsan):$(library stdc++)
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2

facts() {
  LD_PRELOAD=$preload "$python" -c "from ssah_kernels.backends import cpu; print(cpu.facts()['$1'])"
}
for isa in $(facts isa_built | tr -d ,); do
  export SSAH_CPU_CAPABILITY=$isa
  if ! facts isa >/dev/null 2>&1; then
    echo "== $isa: this processor does not have it"
    continue
  fi
  echo "== $isa"
  LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider \
    -m "exhaustive or not exhaustive" "${tests[@]}" -k "$selected"
done
echo "no report"
