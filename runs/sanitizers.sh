#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set
# that this machine has: the operator tests, and some thousand drawn calls against the reference.
#
#   runs/sanitizers.sh [DIR]     DIR: where the instrumented copies are built and kept
#                                (default: build/sanitizers)
#
# Ends with 1 at the first report. Leaks are not looked for: Python keeps much until it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
folder=$(realpath -m "${1:-build/sanitizers}")

tests=(tests/test_ops.py tests/test_cpu_kernels.py tests/test_masked_update.py
  tests/test_drawn_ops.py)
# Left out: tests that compile, trace or start another process, and the one that compares bits with
# torch's own update (another compilation contracts other products).
selected="not opcheck and not compiles and not every_instruction_set and not capability"
selected="$selected and not fused and not 32_bits"

library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

for sanitizer in address undefined; do
  tree=$folder/$sanitizer
  mkdir -p "$tree"
  # A copy: the checkout's own library stays what it is. Unchanged files keep their time, so that
  # only what has changed is compiled again.
  git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$tree"
  # Half the time to compile, and lines in the reports.
  sed -i 's/"-O3"/"-O1"/; s/"-g0"/"-g1"/' "$tree/setup.py"
  checks=$sanitizer
  [ $sanitizer = undefined ] && checks=undefined,float-cast-overflow
  flags="-fsanitize=$checks -fno-sanitize-recover=all -fno-omit-frame-pointer"
  echo "== $sanitizer: building in $tree"
  (cd "$tree" && CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=$sanitizer" SSAH_CUDA=0 MAX_JOBS="${MAX_JOBS:-2}" \
    "$python" setup.py --quiet build_ext --inplace)

  # The interpreter is not instrumented: the runtime has to be there before it.
  preload=$(library "$([ $sanitizer = address ] && echo asan || echo ubsan)"):$(library stdc++)
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2
  isas=$(cd "$tree" && LD_PRELOAD=$preload "$python" -c \
    'from ssah_kernels.backends import cpu; print(cpu.facts()["isa_built"].replace(",", ""))')
  for isa in $isas; do
    if ! (cd "$tree" && SSAH_CPU_CAPABILITY=$isa LD_PRELOAD=$preload "$python" -c \
      'from ssah_kernels.backends import cpu; cpu.facts()' 2>/dev/null); then
      echo "== $sanitizer, $isa: this processor does not have it"
      continue
    fi
    echo "== $sanitizer, $isa"
    (cd "$tree" && SSAH_CPU_CAPABILITY=$isa LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider \
      -m "exhaustive or not exhaustive" "${tests[@]}" -k "$selected")
  done
done
echo "no report"
