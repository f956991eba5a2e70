# The GPU's half of the build.
#
#   flute_find_cuda()                       sets FLUTE_HAS_CUDA, and enables the language if so
#   flute_add_cuda(<target>)                adds its sources and the instances of its kernels to <target>
#   flute_describe_architectures(<var>)     what the build has, as sm_90 and compute_90
#   flute_write_configs(<json> <inc>)       the compiled shapes of a room, from data to macro calls
#
# There is one if FLUTE_CUDA_ARCHITECTURES (or the environment variable of that name) says what to compile
# for, as CMAKE_CUDA_ARCHITECTURES does: "80;90" has machine code and PTX of both, "80-virtual" PTX alone,
# "native" what this machine's GPUs are.

set(FLUTE_CUDA_ARCHITECTURES "$ENV{FLUTE_CUDA_ARCHITECTURES}" CACHE STRING
    "GPU architectures, as for CMAKE_CUDA_ARCHITECTURES; none: a build without GPU kernels")

macro(flute_find_cuda)
  set(FLUTE_HAS_CUDA OFF)
  if(FLUTE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "${FLUTE_CUDA_ARCHITECTURES}")
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      message(FATAL_ERROR "nvcc is ${CMAKE_CUDA_COMPILER_VERSION}; the GPU kernels need 12.8 or later.")
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(FLUTE_HAS_CUDA ON)
  endif()
endmacro()

# What the build contains, in the toolkit's words: sm_90 is machine code, compute_90 PTX.
function(flute_describe_architectures result)
  set(names "")
  set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
  if(architectures STREQUAL "native")
    set(architectures "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
  foreach(architecture IN LISTS architectures)
    if(NOT architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "FLUTE_CUDA_ARCHITECTURES has ${architecture}; expected a number such as 90, 90-real, "
                          "90-virtual, or native alone.")
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
      list(APPEND names "sm_${CMAKE_MATCH_1}")
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
      list(APPEND names "compute_${CMAKE_MATCH_1}")
    endif()
  endforeach()
  if("sm_90" IN_LIST names)
    list(APPEND names sm_90a)  # the sm90 room
  endif()
  string(JOIN " " names ${names})  # a list would not survive as a compile definition
  set(${result} "${names}" PARENT_SCOPE)
endfunction()

function(flute_write_configs json inc)
  file(READ "${json}" text)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${json}")
  string(JSON count LENGTH "${text}" configs)
  math(EXPR last "${count} - 1")
  set(lines "")
  foreach(i RANGE ${last})
    string(JSON numbers GET "${text}" configs ${i})
    string(REGEX REPLACE "[][ \n]" "" numbers "${numbers}")
    string(APPEND lines "FLUTE_CONFIG(${numbers})\n")
  endforeach()
  file(CONFIGURE OUTPUT "${inc}" CONTENT "${lines}" @ONLY)
endfunction()

# One translation unit for every number of bits and type of x, into `result`, and the header that names them.
function(flute_instances ROOM result)
  set(generated "${CMAKE_CURRENT_BINARY_DIR}/generated")
  configure_file(csrc/qgemm/common/kernels.h.in "${generated}/${ROOM}_kernels.h" @ONLY)
  set(TYPE_f16 __half)
  set(TYPE_bf16 __nv_bfloat16)
  set(files "")
  foreach(BITS 2 3 4)
    foreach(DTYPE f16 bf16)
      set(TYPE ${TYPE_${DTYPE}})
      set(file "${generated}/${ROOM}_b${BITS}_${DTYPE}.cu")
      configure_file(csrc/qgemm/common/instance.cu.in "${file}" @ONLY)
      list(APPEND files "${file}")
    endforeach()
  endforeach()
  set(${result} "${files}" PARENT_SCOPE)
endfunction()

function(flute_add_cuda target)
  flute_instances(sm80 instances)
  target_sources(${target} PRIVATE
    csrc/core/gpu.cu
    csrc/core/launch.cu
    csrc/hadamard/cuda/rotate.cu
    csrc/qgemm/common/dequantize.cu
    csrc/qgemm/common/pack.cu
    csrc/qgemm/sm80/room.cu
    ${instances})
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3 --threads=1>)
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)

  # Hopper's own instructions exist in code for 9.0a alone, which no later GPU runs: its room is compiled for
  # that, where the build has 9.0 at all, beside what the rest is compiled for.
  set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
  if(architectures STREQUAL "native")
    set(architectures "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
  if(architectures MATCHES "(^|;)90a?(-real)?(;|$)")
    flute_instances(sm90 instances)
    add_library(flute_sm90 OBJECT csrc/qgemm/sm90/room.cu csrc/qgemm/sm90/tensor_map.cu ${instances})
    set_target_properties(flute_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
    target_include_directories(flute_sm90 PRIVATE csrc "${CMAKE_CURRENT_BINARY_DIR}/generated")
    target_compile_options(flute_sm90 PRIVATE -O3)
    target_sources(${target} INTERFACE $<TARGET_OBJECTS:flute_sm90>)
  else()
    target_sources(${target} PRIVATE csrc/no_cuda/no_sm90.cpp)
  endif()
endfunction()
