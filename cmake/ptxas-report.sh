#!/bin/sh
# Runs a compile command; what it says on stderr, the resource report of -Xptxas=-v, goes to <object>.ptxas. Everything
# that is not part of that report is still shown.
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' -e 'Compiling entry function' -e '^ptxas *: *info' "$object.ptxas" >&2
exit $status
