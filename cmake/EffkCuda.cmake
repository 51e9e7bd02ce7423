# CUDA kernels and their bindings, where nvcc is; and the same sources compiled for the CPU, for tests (csrc/emu).
#
#   EFFK_CUDA         AUTO: with nvcc if it is found · ON: nvcc is required · OFF
#   EFFK_CUDA_ARCHS   a CMAKE_CUDA_ARCHITECTURES list, or "all": machine code for every architecture, for releases
#   EFFK_CUEMU        also build effk_emu, torch.ops.effk_emu.* on CPU tensors
# Sets EFFK_HAVE_CUDA and EFFK_CUDA_INFO. No torch header meets nvcc and no CUDA header the bindings, so that any build of
# torch will do; cudart is linked statically, so that a machine without a driver can still load the library.

set(EFFK_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
if(NOT EFFK_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "effk: EFFK_CUDA: expected AUTO, ON or OFF, got '${EFFK_CUDA}'")
endif()
# Machine code of 8.0 serves 8.6 and 8.9 too (one major version is binary compatible), and from the code for the virtual
# 9.0 the driver compiles for later devices when a kernel is first used. Two architectures build in a third of the time.
set(EFFK_CUDA_ARCHS "80-real;90" CACHE STRING "Architectures of the CUDA kernels: a list, or all")
set(EFFK_CUDA_ALL "80-real;86-real;89-real;90a-real;100f-real;120f-real;90-virtual")
option(EFFK_CUEMU "Build the CUDA kernels for the CPU too, for tests" OFF)

set(EFFK_CUDA_INFO "")
if(EFFK_CUDA STREQUAL "OFF")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(EFFK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "effk: EFFK_CUDA=ON, but nvcc was not found: put it on PATH or set CUDACXX, or build with EFFK_CUDA=OFF")
  endif()
  message(STATUS "effk: nvcc was not found, building the CPU kernels only (EFFK_CUDA=ON makes this an error)")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${EFFK_CUDA_ARCHS})
if(EFFK_CUDA_ARCHS STREQUAL "all")
  set(CMAKE_CUDA_ARCHITECTURES ${EFFK_CUDA_ALL})
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(EFFK_HAVE_CUDA ON)
string(REPLACE ";" "," archs "${CMAKE_CUDA_ARCHITECTURES}")
set(EFFK_CUDA_INFO "nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${archs}")

# Of each op with CUDA kernels: csrc/ops/<op>/cuda*.cu and the binding csrc/torch/cuda/<op>.cpp.
set(EFFK_CUDA_OPS wq_linear wq_grouped_linear fftconv depthwise_conv1d dense_linear dyad_linear quik_linear sp24 relu_ffn neuron_lists attention bitmask_linear decoder)
set(kernels "")
set(bindings csrc/torch/cuda/stream.cpp)
foreach(op ${EFFK_CUDA_OPS})
  file(GLOB files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/${op}/cuda*.cu)
  list(APPEND kernels ${files})
  list(APPEND bindings csrc/torch/cuda/${op}.cpp)
endforeach()

# The launcher keeps ptxas's report of registers, shared memory and spills beside each object: tests/cuda reads it.
add_library(effk_cuda STATIC ${kernels})
target_include_directories(effk_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(effk_cuda PRIVATE -Xptxas=-v --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra)
set_target_properties(effk_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static
  CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/cmake/ptxas-report.sh)

target_sources(effk_ops PRIVATE ${bindings})
target_compile_definitions(effk_ops PRIVATE EFFK_CUDA_ARCHS="${archs}")
target_link_libraries(effk_ops PRIVATE effk_cuda CUDA::cudart_static)
set_target_properties(effk_ops PROPERTIES LINKER_LANGUAGE CXX)

if(EFFK_CUEMU AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(emulated "")
  foreach(kernel ${kernels})
    get_filename_component(name ${kernel} NAME_WE)
    get_filename_component(folder ${kernel} DIRECTORY)
    get_filename_component(op ${folder} NAME)
    set(file ${CMAKE_BINARY_DIR}/emu/${op}_${name}.cpp)
    file(CONFIGURE OUTPUT ${file} CONTENT "#include \"ops/${op}/${name}.cu\"\n")
    list(APPEND emulated ${file})
  endforeach()
  add_library(effk_emu MODULE ${emulated} ${bindings} csrc/emu/cuemu.cpp csrc/torch/schema.cpp csrc/torch/tensor.cpp)
  target_compile_definitions(effk_emu PRIVATE EFFK_CUEMU)
  # Unoptimised templates would cost more test time than their compilation saves; -O1 is the balance.
  target_compile_options(effk_emu PRIVATE -O1 -fno-strict-aliasing -Wno-unknown-pragmas)
  target_include_directories(effk_emu SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_libraries(effk_emu PRIVATE effk_flags effk_torch)
  set_target_properties(effk_emu PROPERTIES PREFIX "")
  install(TARGETS effk_emu LIBRARY DESTINATION effk)
endif()
