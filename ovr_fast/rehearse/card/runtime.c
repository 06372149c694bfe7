// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// The CUDA runtime and cuBLAS of cards that are not there: devices, streams, events, launches and
// matrix products. Everything is done already, nothing is computed, all of it is counted. build.py
// adds a function that returns 0 for every other symbol that torch wants from these libraries.
//
//   PRETEND_GPUS  how many cards there are (1); CUDA_VISIBLE_DEVICES picks among them
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime.h"

#define SUCCEEDS(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

// ------------------------------------------------------------------------------------------- counts

struct pretend_counts counts;
static void (*watcher)(const char *);

size_t pretend_read_counts(struct pretend_counts *out) {
  *out = counts;
  return sizeof counts;
}

void pretend_watch(void (*seen)(const char *)) { watcher = seen; }

void count_wait(const char *what) {
  counts.synchronizations++;
  if (watcher) watcher(what);
}

void pretend_count_launch(void) { counts.launches++; }

void pretend_count_collective(enum pretend_kind kind, size_t bytes) {
  counts.collectives++;
  counts.collective_bytes += bytes;
  counts.of_kind[kind]++;
  counts.bytes_of_kind[kind] += bytes;
}

// ------------------------------------------------------------------------------------------ devices

static __thread int current = 0;

int pretend_current_device(void) { return current; }

// -1 where CUDA_VISIBLE_DEVICES names fewer.
int pretend_physical_device(int device) {
  const char *list = getenv("CUDA_VISIBLE_DEVICES");
  for (; list && *list && device; device--) {
    list = strchr(list, ',');
    if (!list) return -1;
    list++;
  }
  return list && *list ? atoi(list) : device;
}

int pretend_device_count(void) {
  const char *all_of_them = getenv("PRETEND_GPUS"), *list = getenv("CUDA_VISIBLE_DEVICES");
  int all = all_of_them ? atoi(all_of_them) : 1, count = 0;
  if (!list) return all;
  while (*list && atoi(list) >= 0 && atoi(list) < all) {
    count++;
    list = strchr(list, ',');
    if (!list) break;
    list++;
  }
  return count;
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = pretend_device_count();
  return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= pretend_device_count()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, CARD_NAME);
  out->uuid.bytes[0] = pretend_physical_device(device) + 1;
  out->major = CARD_MAJOR;
  out->minor = CARD_MINOR;
  out->multiProcessorCount = CARD_MULTIPROCESSORS;
  out->totalGlobalMem = CARD_BYTES;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = CARD_SHARED_BYTES_BLOCK;
  out->sharedMemPerMultiprocessor = CARD_SHARED_BYTES;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->l2CacheSize = CARD_L2_BYTES;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = CARD_MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = CARD_MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = CARD_MULTIPROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = CARD_SHARED_BYTES_BLOCK; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = CARD_SHARED_BYTES; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION_REPORTED;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  snprintf(text, length, "0000:%02x:00.0", pretend_physical_device(device));
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

SUCCEEDS(cudaDeviceEnablePeerAccess, int device, unsigned flags)

// ------------------------------------------------------------- streams and events: handles, no more

static _Atomic long last_handle = 16;

static void *new_handle(void) { return (void *)(last_handle += 16); }

cudaError_t cudaStreamCreate(cudaStream_t *out) {
  *out = new_handle();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
  return cudaStreamCreate(out);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
  return cudaStreamCreate(out);
}

cudaError_t cudaEventCreate(cudaEvent_t *out) {
  *out = new_handle();
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  return cudaEventCreate(out);
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *out, cudaEvent_t event) {
  memset(out, 0, sizeof *out);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *out, cudaIpcEventHandle_t handle) {
  return cudaEventCreate(out);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = 1.0f;  // not 0: somebody may divide by it
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  count_wait("synchronize");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(NULL); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaStreamSynchronize(NULL); }

SUCCEEDS(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
SUCCEEDS(cudaStreamDestroy, cudaStream_t stream)
SUCCEEDS(cudaStreamQuery, cudaStream_t stream)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)
SUCCEEDS(cudaEventDestroy, cudaEvent_t event)
SUCCEEDS(cudaEventQuery, cudaEvent_t event)
SUCCEEDS(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
SUCCEEDS(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags)
SUCCEEDS(cudaGetLastError, void)
SUCCEEDS(cudaPeekAtLastError, void)
SUCCEEDS(cudaHostRegister, void *pointer, size_t n, unsigned flags)
SUCCEEDS(cudaHostUnregister, void *pointer)

const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the pretended card";
}

const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

// ------------------------------------------------------------------------ kernels: counted, not run

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
  counts.launches++;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *launch, const void *kernel,
                                void **arguments) {
  counts.launches++;
  return cudaSuccess;
}

// What nvcc's host code calls around a launch and at load; its declarations are not public.
int __cudaGetKernel(void **out, const void *kernel) {
  *out = (void *)kernel;
  return 0;
}
int __cudaLaunchKernel(void) {
  counts.launches++;
  return 0;
}
unsigned __cudaPushCallConfiguration(void) { return 0; }
int __cudaPopCallConfiguration(void *grid, void *block, unsigned long *shared, void **stream) {
  return 0;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[16];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}

SUCCEEDS(cudaFuncSetAttribute, const void *kernel, enum cudaFuncAttribute attribute, int value)

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 64;
  out->ptxVersion = out->binaryVersion = 10 * CARD_MAJOR;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel,
                                                                   int block, size_t shared,
                                                                   unsigned flags) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  char second[128];
  snprintf(second, sizeof second, "%s_v2", name);
  *out = dlsym(driver, second);
  if (!*out) *out = dlsym(driver, name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// -------------------------------------------------------------------- cuBLAS and cuDNN, by name only

int cublasCreate_v2(void **out) {
  *out = new_handle();
  return 0;
}
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130000; }

static int new_descriptor(void **out) {
  *out = calloc(1, 512);  // larger than any of them
  return 0;
}
static int free_descriptor(void *descriptor) {
  free(descriptor);
  return 0;
}
int cublasLtMatmulDescCreate(void **out, int compute, int scale) { return new_descriptor(out); }
int cublasLtMatmulDescDestroy(void *descriptor) { return free_descriptor(descriptor); }
int cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
  return new_descriptor(out);
}
int cublasLtMatrixLayoutDestroy(void *descriptor) { return free_descriptor(descriptor); }
int cublasLtMatmulPreferenceCreate(void **out) { return new_descriptor(out); }
int cublasLtMatmulPreferenceDestroy(void *descriptor) { return free_descriptor(descriptor); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
  *found = 1;
  return 0;
}

#define MATRIX_PRODUCT(name) \
  int name(void) {           \
    counts.matrix_products++; \
    counts.launches++;       \
    return 0;                \
  }
MATRIX_PRODUCT(cublasLtMatmul)
MATRIX_PRODUCT(cublasGemmEx)
MATRIX_PRODUCT(cublasGemmStridedBatchedEx)
MATRIX_PRODUCT(cublasSgemm_v2)
MATRIX_PRODUCT(cublasSgemmEx)
MATRIX_PRODUCT(cublasSgemmStridedBatched)
MATRIX_PRODUCT(cublasDgemm_v2)

int cudnnCreate(void **out) {
  *out = new_handle();
  return 0;
}
size_t cudnnGetVersion(void) { return 92000; }
size_t cudnnGetCudartVersion(void) { return CUDA_VERSION_REPORTED; }
