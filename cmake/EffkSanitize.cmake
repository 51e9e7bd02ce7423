# -DEFFK_SANITIZE=address,undefined builds everything with those sanitizers, and any finding ends the program.
# Meant for the torch-free C++ tests: an instrumented library inside an ordinary Python would need preloading.

set(EFFK_SANITIZE "" CACHE STRING "Sanitizers, comma-separated, e.g. address,undefined")

function(effk_sanitize target)
  if(EFFK_SANITIZE)
    set(flags -fsanitize=${EFFK_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    target_compile_options(${target} INTERFACE ${flags})
    target_link_options(${target} INTERFACE ${flags})
  endif()
endfunction()
