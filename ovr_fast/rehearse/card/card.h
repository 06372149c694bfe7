// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// What the pretended card's libraries share. The runtime library owns all state and is preloaded;
// libcuda and libnvidia-ml find its functions by name (dlsym).
#ifndef OVR_FAST_CARD_H
#define OVR_FAST_CARD_H

#include <stddef.h>

// An H100 SXM5, as its own runtime reports it.
#define CARD_NAME "NVIDIA H100 80GB HBM3 (pretended)"
#define CARD_BYTES 85520809984UL  // 79.6 GiB
#define CARD_MULTIPROCESSORS 132
#define CARD_SHARED_BYTES 233472        // of a multiprocessor
#define CARD_SHARED_BYTES_BLOCK 232448  // that a block may ask for
#define CARD_L2_BYTES 52428800
#define CARD_MAJOR 9
#define CARD_MINOR 0
#define CUDA_VERSION_REPORTED 13000

// What a process takes of the card beside torch's allocator: context, code of kernels, cuBLAS and NCCL.
// 2.42 GiB of an H100 under a trainer of one rank (benchmarks/results/h100_step.json, "fused AdamW").
#define CONTEXT_BYTES 2600000000UL

// Copies of more bytes than this are counted and not made: nobody reads them, and they would turn
// address space into pages.
#define LARGEST_COPY (1UL << 20)

enum pretend_kind {
  KIND_ALL_REDUCE, KIND_REDUCE, KIND_REDUCE_SCATTER, KIND_ALL_GATHER, KIND_BROADCAST,
  KIND_SEND_OR_RECEIVE, KINDS
};

struct pretend_counts {
  long launches;             // kernels of torch, Triton and cuBLAS
  long synchronizations;     // the host waited for the card
  long copies_to_host;       // any size
  long bytes_to_host;
  long bytes_to_device;
  long matrix_products;      // by cuBLAS, among the launches
  long collectives;          // NCCL calls, a send or a receive each being one
  long collective_bytes;     // this rank's part of them
  long of_kind[KINDS];       // the same two, apart
  long bytes_of_kind[KINDS];
  size_t peak_bytes;         // most that this process has taken of a card, context included
};

// Read by the rehearsal between phases. Returns the struct's size, so that a reader that was
// written for another one notices.
size_t pretend_read_counts(struct pretend_counts *out);

// Calls `seen("synchronize" | "copy")` wherever the host waits for the card; NULL stops it.
void pretend_watch(void (*seen)(const char *));

int pretend_device_count(void);        // that CUDA_VISIBLE_DEVICES leaves
int pretend_current_device(void);      // of the calling thread
int pretend_take(int device, size_t n);  // 0, or 2 (cudaErrorMemoryAllocation) where the card is full
void pretend_give(int device, size_t n);
size_t pretend_free_bytes(int device);
void pretend_count_launch(void);
void pretend_count_collective(enum pretend_kind kind, size_t bytes);

#endif
