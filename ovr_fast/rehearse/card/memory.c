// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// Memory of the pretended cards. A card's bytes are address space: pieces of one sparse file of the
// process, without pages until something small is copied there. A file, so that another process can
// map it (CUDA IPC). How much each process has of a card is kept where all processes see it.
//
//   PRETEND_CARDS   a name under which processes share the cards, as they do real ones; without it
//                   each process has cards of its own
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "card.h"
#include "runtime.h"

#define MOST_CARDS 16
#define MOST_PROCESSES 64
#define MOST_BLOCKS (1 << 16)
#define PAGE 4096UL

// ---------------------------------------------------------------- what each process has of a card

struct card {
  struct {
    _Atomic int pid;  // 0: free
    _Atomic size_t bytes;
  } users[MOST_PROCESSES];
};

static struct card *cards[MOST_CARDS];

static struct card *card_of(int device) {
  int number = pretend_physical_device(device) % MOST_CARDS;
  if (cards[number]) return cards[number];
  const char *name = getenv("PRETEND_CARDS");
  int file = -1;
  if (name) {
    char path[128];
    snprintf(path, sizeof path, "/pretend-card-%s-%d", name, number);
    file = shm_open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct card))) {
      perror("pretended card: shared memory");
      abort();
    }
  }
  int flags = MAP_SHARED | (file < 0 ? MAP_ANONYMOUS : 0);
  cards[number] = mmap(NULL, sizeof(struct card), PROT_READ | PROT_WRITE, flags, file, 0);
  if (file >= 0) close(file);
  return cards[number];
}

static size_t used_bytes(int device) {
  struct card *card = card_of(device);
  size_t sum = 0;
  for (int i = 0; i < MOST_PROCESSES; i++) {
    int pid = card->users[i].pid;
    if (!pid) continue;
    if (pid != getpid() && kill(pid, 0) && errno == ESRCH) {  // it has ended
      card->users[i].bytes = 0;
      card->users[i].pid = 0;
      continue;
    }
    sum += card->users[i].bytes;
  }
  return sum;
}

static _Atomic size_t *own_bytes(int device) {
  struct card *card = card_of(device);
  for (int i = 0; i < MOST_PROCESSES; i++)
    if (card->users[i].pid == getpid()) return &card->users[i].bytes;
  for (int i = 0; i < MOST_PROCESSES; i++) {
    int nobody = 0;
    if (atomic_compare_exchange_strong(&card->users[i].pid, &nobody, getpid())) {
      card->users[i].bytes = CONTEXT_BYTES;  // a process's first touch brings its context
      return &card->users[i].bytes;
    }
  }
  fprintf(stderr, "pretended card: more than %d processes on one card\n", MOST_PROCESSES);
  abort();
}

int pretend_take(int device, size_t n) {
  _Atomic size_t *own = own_bytes(device);
  if (used_bytes(device) + n > CARD_BYTES) return cudaErrorMemoryAllocation;
  size_t now = atomic_fetch_add(own, n) + n;
  if (now > counts.peak_bytes) counts.peak_bytes = now;
  return 0;
}

void pretend_give(int device, size_t n) { atomic_fetch_sub(own_bytes(device), n); }

size_t pretend_free_bytes(int device) {
  own_bytes(device);
  size_t used = used_bytes(device);
  return used > CARD_BYTES ? 0 : CARD_BYTES - used;
}

// -------------------------------------------------------------------------------------- allocations

enum { PINNED = -2, FOREIGN = -1 };  // in place of a device: host memory, another process's memory

static struct block {
  char *start;  // NULL: unused
  size_t bytes;
  long at;  // in the file
  int device;
} blocks[MOST_BLOCKS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int file = -1;
static long file_end = 0;

static struct block *find(const void *pointer) {
  for (int i = 0; i < MOST_BLOCKS; i++) {
    char *start = blocks[i].start;
    if (start && (char *)pointer >= start && (char *)pointer < start + blocks[i].bytes)
      return &blocks[i];
  }
  return NULL;
}

static void *add(int from, long at, size_t n, int device) {
  for (int i = 0; i < MOST_BLOCKS; i++) {
    if (blocks[i].start) continue;
    int flags = MAP_NORESERVE | (from < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    char *start = mmap(NULL, n, PROT_READ | PROT_WRITE, flags, from, at);
    if (start == MAP_FAILED) return NULL;
    blocks[i] = (struct block){start, n, at, device};
    return start;
  }
  fprintf(stderr, "pretended card: more than %d allocations\n", MOST_BLOCKS);
  return NULL;
}

cudaError_t cudaMalloc(void **pointer, size_t n) {
  n = n ? (n + PAGE - 1) & ~(PAGE - 1) : PAGE;
  *pointer = NULL;
  int device = pretend_current_device();
  pthread_mutex_lock(&lock);
  if (!pretend_take(device, n)) {
    if (file < 0) file = memfd_create("pretended-card", 0);
    if (!ftruncate(file, file_end + n)) *pointer = add(file, file_end, n, device);
    file_end += n;
    if (!*pointer) pretend_give(device, n);
  }
  pthread_mutex_unlock(&lock);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  struct block *block = pointer ? find(pointer) : NULL;
  if (block) {
    munmap(block->start, block->bytes);
    if (block->device >= 0) {
      fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block->at, block->bytes);
      pretend_give(block->device, block->bytes);
    }
    block->start = NULL;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = pretend_free_bytes(pretend_current_device());
  *total = CARD_BYTES;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t n, unsigned flags) {
  pthread_mutex_lock(&lock);
  *pointer = add(-1, 0, n ? n : 1, PINNED);
  pthread_mutex_unlock(&lock);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }

cudaError_t cudaHostGetDevicePointer(void **on_device, void *on_host, unsigned flags) {
  *on_device = on_host;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  out->type = cudaMemoryTypeUnregistered;
  out->hostPointer = (void *)pointer;
  pthread_mutex_lock(&lock);
  struct block *block = find(pointer);
  if (block) {
    out->type = block->device == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    out->device = block->device < 0 ? pretend_current_device() : block->device;
    out->devicePointer = (void *)pointer;
    if (out->type == cudaMemoryTypeDevice) out->hostPointer = NULL;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

// ------------------------------------------------------------- CUDA IPC: whose file, and where in it

struct ipc {
  int pid, file;
  long at;
  size_t bytes;
};

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
  memset(handle, 0, sizeof *handle);
  pthread_mutex_lock(&lock);
  struct block *block = find(pointer);
  if (block) {
    struct ipc ipc = {getpid(), file, block->at, block->bytes};
    memcpy(handle, &ipc, sizeof ipc);
  }
  pthread_mutex_unlock(&lock);
  return block ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
  struct ipc ipc;
  memcpy(&ipc, &handle, sizeof ipc);
  if (ipc.pid == getpid()) return cudaErrorDeviceUninitialized;  // a real card refuses its own too
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", ipc.pid, ipc.file);
  int theirs = open(path, O_RDWR);
  pthread_mutex_lock(&lock);
  *pointer = theirs < 0 ? NULL : add(theirs, ipc.at, ipc.bytes, FOREIGN);
  pthread_mutex_unlock(&lock);
  if (theirs >= 0) close(theirs);
  return *pointer ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaIpcCloseMemHandle(void *pointer) { return cudaFree(pointer); }

// ------------------------------------------------------------------------------------------- copies

static void copy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) {
    counts.copies_to_host++;
    counts.bytes_to_host += n;
  } else if (kind == cudaMemcpyHostToDevice) {
    counts.bytes_to_device += n;
  }
  if (n <= LARGEST_COPY) memcpy(to, from, n);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  copy(to, from, n, kind);
  if (kind == cudaMemcpyDeviceToHost) count_wait("copy");
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  copy(to, from, n, kind);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t n) {
  if (n <= LARGEST_COPY) memset(to, value, n);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t stream) {
  return cudaMemset(to, value, n);
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char zeros[4096];
  *pointer = zeros;
  return cudaSuccess;
}
