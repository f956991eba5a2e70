# One object library per CPU instruction set, each compiled with its own flags.
#
#   flute_add_cpu_isas(<target> <folder of sources> <include folder>)
#
# adds the sets that the target processor's family has to <target>. Optimisation is -O3 here whatever
# the rest of the build uses: these files are the kernels.
function(flute_add_cpu_isas target folder include)
  set(sets scalar)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND sets avx2 avx512 avx512bf16)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    list(APPEND sets neon)
  endif()
  set(flags_scalar "")
  set(flags_neon "")
  set(flags_avx2 -mavx2 -mfma -mf16c)
  # 512-bit vectors even where the compiler would keep to 256: the kernels are written for them.
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(flags_avx512bf16 ${flags_avx512} -mavx512vbmi -mavx512bf16)
  # Not every set uses every helper, and GCC's own headers set off the second (its bug 105593).
  set(quiet -Wno-unused-function -Wno-uninitialized -Wno-maybe-uninitialized)
  foreach(set IN LISTS sets)
    add_library(flute_isa_${set} OBJECT ${folder}/${set}.cpp)
    target_include_directories(flute_isa_${set} PRIVATE ${include})
    target_compile_options(flute_isa_${set} PRIVATE -O3 -Wall -Wextra -fno-exceptions ${quiet} ${flags_${set}})
    target_sources(${target} INTERFACE $<TARGET_OBJECTS:flute_isa_${set}>)
  endforeach()
endfunction()
