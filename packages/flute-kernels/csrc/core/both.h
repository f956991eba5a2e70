// Marks what host and device code call; nothing where no CUDA compiler reads it.
#pragma once

#if defined(__CUDACC__)
#define FLUTE_BOTH __host__ __device__
#else
#define FLUTE_BOTH
#endif
