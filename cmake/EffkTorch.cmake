# torch, by directory. find_package(Torch) would cost 2 s, bring run paths of the machine that built torch, and demand
# the whole CUDA toolkit with a CUDA build of torch; the stable ABI needs one include folder and one library.

if(NOT TORCH_DIR)
  message(FATAL_ERROR "effk: pass -DTORCH_DIR=<folder of the torch package>, as setup.py does")
endif()

# The oldest torch that runs what is built here: 2.11, whichever later one it is built with.
set(EFFK_TORCH_TARGET 0x020b000000000000)

add_library(effk_torch INTERFACE)
target_compile_definitions(effk_torch INTERFACE TORCH_TARGET_VERSION=${EFFK_TORCH_TARGET} TORCH_STABLE_ONLY)
target_include_directories(effk_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_directories(effk_torch INTERFACE ${TORCH_DIR}/lib)
target_link_libraries(effk_torch INTERFACE torch_cpu ${CMAKE_DL_LIBS})
