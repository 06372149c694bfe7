// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// A libcuda.so.1 for torch, for Triton's launcher and for vLLM's allocator. The card's state is in
// the runtime library, which must be preloaded. build.py adds a function that returns 0 for every
// other name of cuda.h. Types are written out, since cuda.h renames half of these functions.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "card.h"

static void *runtime(const char *name) {
  void *function = dlsym(RTLD_DEFAULT, name);
  if (function) return function;
  fprintf(stderr, "pretended libcuda: the pretended runtime is not preloaded (no %s)\n", name);
  abort();
}

// A function of card.h, from where it is.
#define RUNTIME(function) ((__typeof__(&function))runtime(#function))

static _Atomic long last_handle = 4096;
static int new_handle(void **out) {
  *out = (void *)(last_handle += 16);
  return 0;
}

// ------------------------------------------------------------------------------------------ devices

int cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION_REPORTED;
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = RUNTIME(pretend_device_count)();
  return 0;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetName(char *text, int length, int device) {
  snprintf(text, length, "%s", CARD_NAME);
  return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = CARD_BYTES;
  return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) {
  memset(uuid, device + 1, 16);
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {  // CU_DEVICE_ATTRIBUTE_...
    case 1: *value = 1024; break;                     // MAX_THREADS_PER_BLOCK
    case 8: *value = 49152; break;                    // MAX_SHARED_MEMORY_PER_BLOCK
    case 10: *value = 32; break;                      // WARP_SIZE
    case 12: *value = 65536; break;                   // MAX_REGISTERS_PER_BLOCK
    case 13: *value = 1980000; break;                 // CLOCK_RATE, kHz
    case 16: *value = CARD_MULTIPROCESSORS; break;    // MULTIPROCESSOR_COUNT
    case 36: *value = 2619000; break;                 // MEMORY_CLOCK_RATE, kHz
    case 37: *value = 5120; break;                    // GLOBAL_MEMORY_BUS_WIDTH
    case 38: *value = CARD_L2_BYTES; break;           // L2_CACHE_SIZE
    case 39: *value = 2048; break;                    // MAX_THREADS_PER_MULTIPROCESSOR
    case 75: *value = CARD_MAJOR; break;              // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = CARD_MINOR; break;              // COMPUTE_CAPABILITY_MINOR
    case 81: *value = CARD_SHARED_BYTES; break;       // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 82: *value = 65536; break;                   // MAX_REGISTERS_PER_MULTIPROCESSOR
    case 97: *value = CARD_SHARED_BYTES_BLOCK; break; // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 0;
  }
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)(4096L * (device + 1));
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)4096L;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = RUNTIME(pretend_current_device)();
  return 0;
}
int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  *free_bytes = RUNTIME(pretend_free_bytes)(RUNTIME(pretend_current_device)());
  *total = CARD_BYTES;
  return 0;
}

// ----------------- memory by pieces: what vLLM's sleeping allocator gives back, keeping the addresses

struct properties {
  int type, handles, location, device;  // how CUmemAllocationProp begins
};
struct piece {
  size_t bytes;
  int device;
};

static int map_at(void *address, size_t n, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0);
  return mmap(address, n, protection, flags, -1, 0) == MAP_FAILED ? 2 : 0;
}
int cuMemGetAllocationGranularity(size_t *bytes, const struct properties *properties, int option) {
  *bytes = 2 << 20;
  return 0;
}
int cuMemAddressReserve(unsigned long *address, size_t n, size_t align, unsigned long wished,
                        unsigned long flags) {
  void *mapped =
      mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = (unsigned long)mapped;
  return mapped == MAP_FAILED ? 2 : 0;
}
int cuMemAddressFree(unsigned long address, size_t n) {
  munmap((void *)address, n);
  return 0;
}
int cuMemCreate(struct piece **out, size_t n, const struct properties *properties,
                unsigned long flags) {
  if (RUNTIME(pretend_take)(properties->device, n)) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  *out = malloc(sizeof **out);
  **out = (struct piece){n, properties->device};
  return 0;
}
int cuMemRelease(struct piece *piece) {
  RUNTIME(pretend_give)(piece->device, piece->bytes);
  free(piece);
  return 0;
}
int cuMemMap(unsigned long address, size_t n, size_t offset, struct piece *piece,
             unsigned long flags) {
  return map_at((void *)address, n, PROT_READ | PROT_WRITE);
}
int cuMemUnmap(unsigned long address, size_t n) { return map_at((void *)address, n, PROT_NONE); }

int cuPointerGetAttribute(void *out, int attribute, unsigned long pointer) {
  if (attribute == 3 || attribute == 6)  // device pointer, start of the range
    *(unsigned long *)out = pointer;
  else
    *(int *)out = attribute == 2 ? 2 : 0;  // memory type: device
  return 0;
}

// ------------------------------------------------------------- modules and kernels: handles, no more

int cuModuleLoadData(void **out, const void *image) { return new_handle(out); }
int cuModuleLoadDataEx(void **out, const void *image, unsigned n, void *options, void *values) {
  return new_handle(out);
}
int cuModuleGetFunction(void **out, void *module, const char *name) { return new_handle(out); }
int cuLibraryLoadData(void **out, const void *code, void *a, void *b, unsigned n, void *c, void *d,
                      unsigned m) {
  return new_handle(out);
}
int cuLibraryGetKernel(void **out, void *library, const char *name) { return new_handle(out); }
int cuKernelGetFunction(void **out, void *kernel) { return new_handle(out); }
int cuFuncGetModule(void **out, void *function) {
  *out = (void *)4096L;
  return 0;
}
// Triton asks for registers here, which are not the kernel's: the rehearsal reads those from cubins.
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 128 : 0;
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int block,
                                                size_t shared) {
  *count = 1;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *count, void *function, void *launch) {
  *count = CARD_MULTIPROCESSORS / 2;
  return 0;
}
int cuStreamCreate(void **out, unsigned flags) { return new_handle(out); }
int cuEventCreate(void **out, unsigned flags) { return new_handle(out); }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }

// What the real one refuses: a tensor map that the hardware could not follow.
int cuTensorMapEncodeTiled(void *out, int type, unsigned rank, void *base,
                           const unsigned long *sizes, const unsigned long *strides,
                           const unsigned *box, const unsigned *element_strides, int interleave,
                           int swizzle, int promotion, int fill) {
  if (((unsigned long)base & 15) || rank < 1 || rank > 5) {
    fprintf(stderr, "tensor map: base %p is not aligned to 16 bytes, or rank %u\n", base, rank);
    return 1;
  }
  for (unsigned k = 0; k + 1 < rank; k++)
    if (strides[k] & 15) {
      fprintf(stderr, "tensor map: a stride of %lu is no multiple of 16 bytes\n", strides[k]);
      return 1;
    }
  for (unsigned k = 0; k < rank; k++)
    if (!box[k] || box[k] > 256 || !sizes[k]) {
      fprintf(stderr, "tensor map: box %u or size %lu is out of range\n", box[k], sizes[k]);
      return 1;
    }
  memset(out, 1, 128);
  return 0;
}

int cuLaunchKernel(void) {
  RUNTIME(pretend_count_launch)();
  return 0;
}
int cuLaunchKernelEx(void) { return cuLaunchKernel(); }

// ---------------------------------------------------------------------------------- errors and names

int cuGetErrorString(int error, const char **text) {
  *text = error == 2 ? "out of memory" : "an error of the pretended card";
  return 0;
}
int cuGetErrorName(int error, const char **text) {
  *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
static int nothing(void) { return 0; }
int cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long flags,
                        int *status) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  char second[128];
  snprintf(second, sizeof second, "%s_v2", name);
  *out = dlsym(driver, second);
  if (!*out) *out = dlsym(driver, name);
  if (!*out) *out = (void *)nothing;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **out, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, out, version, flags, NULL);
}
