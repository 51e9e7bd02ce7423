# -DEFFK_SANITIZE=address,undefined builds everything with those sanitizers, and any finding ends the program.
# Meant for the torch-free C++ tests: an instrumented library inside an ordinary Python would need preloading.

set(EFFK_SANITIZE "" CACHE STRING "Sanitizers, comma-separated, e.g. address,undefined")

function(effk_sanitize target)
  if(EFFK_SANITIZE)
    # Kernels are thousands of inlined loads. What UBSan asks of the pointer of each, and ASan's checks written out at each, let one
    # file compile for minutes; the first is ASan's and the guard pages' matter anyway, the second are calls instead.
    set(flags -fsanitize=${EFFK_SANITIZE} -fno-sanitize=null,alignment,object-size,pointer-overflow -fno-sanitize-recover=all
        -fno-omit-frame-pointer -g1)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      list(APPEND flags --param=asan-instrumentation-with-call-threshold=0)
    endif()
    target_compile_options(${target} INTERFACE ${flags})
    target_link_options(${target} INTERFACE ${flags})
  endif()
endfunction()
