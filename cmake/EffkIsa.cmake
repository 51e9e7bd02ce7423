# The only -m flags of the project: one object library per instruction-set tier.
#
# A tier's flags switch its features on and the next tier's off, so that a file can use no more than its tier and a
# -march in CXXFLAGS cannot widen it. Why one translation unit per tier, and not target attributes: an always-inline
# helper cannot be inlined into a function of another target. What must not leak out of such a unit (any inline function
# that the linker could merge into baseline code) is checked by tests/test_symbols.py.

set(EFFK_TIERS "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(EFFK_TIERS avx2 avx512 avx512vnni avx512bf16)
  add_compile_definitions(EFFK_X86)  # the drivers' tables name the x86 kernels
endif()

set(EFFK_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2 -mno-avx512f)
set(avx512 -mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(EFFK_FLAGS_avx512 ${avx512} -mno-avx512vnni -mno-avx512vbmi -mno-avx512vbmi2 -mno-gfni)
set(avx512vnni ${avx512} -mavx512vnni -mavx512vbmi -mavx512vbmi2 -mgfni)
set(EFFK_FLAGS_avx512vnni ${avx512vnni} -mno-avx512bf16)
# Not a tier but a feature on top of avx512vnni (csrc/isa/isa.h), in files of its own for the same reason.
set(EFFK_FLAGS_avx512bf16 ${avx512vnni} -mavx512bf16)

# g++ 12 sees an uninitialised variable in its own AVX-512 intrinsics (GCC bug 105593), thousands of times.
set(EFFK_WARNINGS_avx512 $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)

# effk_collect_ops(op...) makes
#   EFFK_BASELINE_SOURCES   csrc/ops/<op>/{driver,pack,plan,gradient,scalar}.cpp, compiled with baseline flags
#   effk_<tier>             object library of csrc/ops/<op>/<tier>.cpp; an op without such a file has no kernel of the tier
#   EFFK_TIER_OBJECTS       their objects, for the link line
# csrc/gemm and csrc/gemm/int8, the matrix products that several ops call, are laid out like an op.
function(effk_collect_ops)
  set(baseline "")
  set(folders ${ARGN})
  list(TRANSFORM folders PREPEND ops/)
  list(APPEND folders gemm gemm/int8)
  foreach(folder ${folders})
    foreach(part driver pack plan gradient scalar)
      set(file ${PROJECT_SOURCE_DIR}/csrc/${folder}/${part}.cpp)
      if(EXISTS ${file})
        list(APPEND baseline ${file})
      endif()
    endforeach()
  endforeach()
  set(objects "")
  foreach(tier ${EFFK_TIERS})
    set(sources "")
    foreach(folder ${folders})
      set(file ${PROJECT_SOURCE_DIR}/csrc/${folder}/${tier}.cpp)
      if(EXISTS ${file})
        list(APPEND sources ${file})
      endif()
    endforeach()
    if(sources)
      add_library(effk_${tier} OBJECT ${sources})
      target_link_libraries(effk_${tier} PRIVATE effk_flags)
      target_compile_options(effk_${tier} PRIVATE ${EFFK_FLAGS_${tier}})
      if(tier MATCHES "^avx512")
        target_compile_options(effk_${tier} PRIVATE ${EFFK_WARNINGS_avx512})
      endif()
      list(APPEND objects $<TARGET_OBJECTS:effk_${tier}>)
    endif()
  endforeach()
  set(EFFK_BASELINE_SOURCES ${baseline} PARENT_SCOPE)
  set(EFFK_TIER_OBJECTS ${objects} PARENT_SCOPE)
endfunction()
