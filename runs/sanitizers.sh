#!/usr/bin/env bash
# The CPU kernels under sanitizers, on every instruction set that this machine has.
#
#   runs/sanitizers.sh [DIR]     DIR: where the instrumented copies are built and kept
#                                (default: build/sanitizers)
#
#   AddressSanitizer and UndefinedBehaviorSanitizer, with casts of floats beyond the integers:
#       the operator tests, wrong calls of the bare operators, and DRAWS drawn calls against the
#       reference (default: 10000)
#   ThreadSanitizer: DRAWS / 10 drawn calls from one thread and from three, the work of each shared
#       out to 2, 3 and 5 threads (tests/helpers/threaded_parallel_for.cpp); before that, a race that
#       is planted must be reported
#   the heap in use, over 1000 calls of each operator (without a sanitizer)
#
# Environment: DRAWS; ISAS, instruction sets by name (default: all that the processor has); ONLY,
# address or thread, to run one of the two. Ends with 1 at the first report. Leaks are not looked
# for by AddressSanitizer: Python keeps much until it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=$PWD/.venv/bin/python
tree=$(realpath -m "${1:-build/sanitizers}")
draws=${DRAWS:-10000}
only=${ONLY:-address thread}

tests=(tests/kernels/test_ops.py tests/kernels/test_cpu_kernels.py tests/kernels/test_masked_update.py
  tests/kernels/test_drawn_ops.py)
# Left out: tests that compile, trace or start another process, and the one that compares bits with
# torch's own update (another compilation contracts other products).
selected="not opcheck and not compiles and not every_instruction_set and not capability"
selected="$selected and not fused and not 32_bits"

library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

# build NAME FLAGS: an instrumented copy in $tree/NAME. The checkout's own library stays what it is;
# unchanged files keep their time, so that only what has changed is compiled again.
build() {
  mkdir -p "$tree/$1"
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -c --null -T - | tar -x -C "$tree/$1"
  cd "$tree/$1"
  # Half the time to compile, and lines in the reports.
  sed -i 's/"-O3"/"-O1"/; s/"-g0"/"-g1"/' setup.py
  touch -r "$checkout/setup.py" setup.py
  echo "== building in $tree/$1"
  CFLAGS=$2 CXXFLAGS=$2 LDFLAGS="${2%% *}" SSAH_CUDA=0 MAX_JOBS="${MAX_JOBS:-2}" \
    "$python" setup.py --quiet build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
}

# The interpreter is not instrumented: the runtimes have to be there before it. TSan wants memory
# where it expects it, which the last does.
under() {
  LD_PRELOAD=$preload PYTHONPATH=.:tests:tests/kernels:tests/helpers setarch "$(uname -m)" -R "$python" "$@"
}
fact() { under -c "from ssah_kernels.backends import cpu; print(cpu.facts()['$1'])"; }

# each COMMAND...: runs it for every instruction set, with SSAH_CPU_CAPABILITY set.
each() {
  local isa
  for isa in ${ISAS:-$(fact isa_built | tr -d ,)}; do
    export SSAH_CPU_CAPABILITY=$isa
    if ! fact isa >/dev/null 2>&1; then
      echo "== $isa: skipped, this processor does not have it"
    else
      echo "== $isa"
      "$@"
    fi
    unset SSAH_CPU_CAPABILITY
  done
}

of_address() {
  under -m pytest -q -n 0 -p no:cacheprovider -m "exhaustive or not exhaustive" "${tests[@]}" \
    -k "$selected"
  under -m pytest -q -n 0 -p no:cacheprovider tests/kernels/test_native_ops.py -k harm
  under runs/drawn_calls.py "$draws"
}

of_threads() {
  if PLANTED_RACE=1 under runs/drawn_calls.py 24 >planted.log 2>&1 ||
    ! grep -q "WARNING: ThreadSanitizer: data race" planted.log; then
    echo "a planted race was not reported: see $PWD/planted.log" >&2
    return 1
  fi
  under runs/drawn_calls.py $((draws / 10))
  under runs/drawn_calls.py $((draws / 10)) 3
}

for name in $only; do
  cd "$checkout"
  if [ "$name" = address ]; then
    checks=address,undefined,float-cast-overflow
    build address "-fsanitize=$checks -fno-sanitize-recover=all -fno-omit-frame-pointer"
    preload=$(library asan):$(library ubsan):$(library stdc++)
    export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2
    each of_address
  else
    build thread "-fsanitize=thread -fno-omit-frame-pointer"
    include=$("$python" -c "from torch.utils.cpp_extension import include_paths
print(*('-I' + path for path in include_paths()))")
    # shellcheck disable=SC2086
    "${CXX:-g++}" -std=c++17 -O1 -g1 -fPIC -shared -fsanitize=thread $include \
      tests/helpers/threaded_parallel_for.cpp -o threads.so
    preload=$(library tsan):$(library stdc++):$PWD/threads.so
    export TSAN_OPTIONS="halt_on_error=1 exitcode=66" OMP_NUM_THREADS=1
    each of_threads
  fi
done

cd "$checkout"
unset SSAH_CPU_CAPABILITY
"$python" -m pytest -q -n 0 -p no:cacheprovider tests/kernels/test_native_ops.py -k heap
echo "no report"
