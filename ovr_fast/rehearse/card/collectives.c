// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// NCCL between processes of one machine. Ranks meet in shared memory; a rank that asks for something
// else than its peers (operation, type, count, reduction, root) ends the run and says so. Parts of up
// to 1 MiB are exchanged and reduced, of larger ones nothing arrives. A rank that waits too long says
// for what and for whom, and aborts (with PYTHONFAULTHANDLER=1 Python then prints where it is).
//
// Every call blocks the host until its peers are there (a send: until the peer took the one before),
// so an order that only separate streams would make safe counts as a hang.
//
//   PRETEND_DEADLINE  seconds that a rank waits for its peers (60)
//   PRETEND_ALONE     1: no peers are there. Each call is counted and returns with this rank's own
//                     part in every place; what others would send does not arrive.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "card.h"

enum kind { NOTHING, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, SPLIT, JOIN, SEND, RECV };
static const char *kinds[] = {"nothing", "AllReduce", "AllGather", "ReduceScatter", "Broadcast",
                              "Reduce", "CommSplit", "CommInitRank", "Send", "Recv"};

// ncclDataType_t and ncclRedOp_t, in their order.
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
static const char *types[] = {"int8",    "uint8",   "int32",   "uint32",   "int64",  "uint64",
                              "float16", "float32", "float64", "bfloat16", "float8", "float8"};
static const int widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
enum { SUM, PRODUCT, MAX, MIN, AVERAGE };
static const char *reductions[] = {"sum", "product", "max", "min", "average", "scaled sum"};

struct operation {
  int kind, type, reduction, root;
  long count;
};
struct slot {  // a rank's part of a collective
  _Atomic long arrived, left;
  struct operation operation;
  char data[LARGEST_COPY];
};
struct box {  // from one rank to another
  _Atomic long sent, taken;
  struct operation operation;
  char data[LARGEST_COPY];
};
struct shared {
  _Atomic int size;
  char padding[60];
  struct slot ranks[];  // and behind them a box for each pair
};
struct comm {
  int size, rank, splits;
  long number;  // of the last collective
  uint64_t key;
  struct shared *shared;  // NULL: alone
};

static size_t shared_bytes(int size) {
  return sizeof(struct shared) + size * sizeof(struct slot) +
         (size_t)size * size * sizeof(struct box);
}
static struct box *box_between(struct comm *comm, int from, int to) {
  return (struct box *)&comm->shared->ranks[comm->size] + from * comm->size + to;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}
static double deadline(void) {
  const char *seconds = getenv("PRETEND_DEADLINE");
  return now() + (seconds ? atof(seconds) : 60.0);
}
static void doze(long *tries) {
  if ((*tries)++ < 50)
    sched_yield();
  else
    usleep(*tries < 2000 ? 20 : 500);
}

// --------------------------------------------------- complaints: collected, and written at one stroke

static __thread FILE *complaint;
static __thread char *complaint_text;
static __thread size_t complaint_length;

static void show(struct operation operation) {
  int reduces = operation.kind == ALL_REDUCE || operation.kind == REDUCE_SCATTER ||
                operation.kind == REDUCE;
  fprintf(complaint, "%s of %ld %s", kinds[operation.kind], operation.count, types[operation.type]);
  if (reduces)
    fprintf(complaint, ", %s", reductions[operation.reduction > 5 ? 5 : operation.reduction]);
  if (operation.kind == BROADCAST || operation.kind == REDUCE)
    fprintf(complaint, ", root %d", operation.root);
}
static void begin_complaint(struct comm *comm, struct operation operation, long number) {
  const char *rank = getenv("RANK");
  complaint = open_memstream(&complaint_text, &complaint_length);
  fprintf(complaint,
          "\npretended NCCL: rank %d of %d in communicator %06lx (RANK %s, process %d), "
          "operation %ld, ",
          comm->rank, comm->size, (long)(comm->key & 0xffffff), rank ? rank : "-", getpid(),
          number);
  show(operation);
}
static void end_complaint(void) {
  fprintf(complaint, "\n");
  fclose(complaint);
  if (write(STDERR_FILENO, complaint_text, complaint_length)) abort();
  abort();
}

// ------------------------------------------------------------------------------------ how ranks meet

static _Atomic long *mark_of(struct slot *slot, int leaving) {
  return leaving ? &slot->left : &slot->arrived;
}

// Whoever is late is named, with what it did last.
static void wait_for_all(struct comm *comm, struct operation operation, int leaving, long number) {
  double end = deadline();
  long tries = 0;
  struct slot *ranks = comm->shared->ranks;
  for (int r = 0; r < comm->size; r++) {
    while (*mark_of(&ranks[r], leaving) < number) {
      if (now() > end) {
        begin_complaint(comm, operation, comm->number);
        fprintf(complaint, ": waits for");
        for (int k = 0; k < comm->size; k++) {
          if (*mark_of(&ranks[k], leaving) >= number) continue;
          fprintf(complaint, " rank %d (last here: operation %ld, ", k, ranks[k].arrived);
          show(ranks[k].operation);
          fprintf(complaint, ")");
        }
        end_complaint();
      }
      doze(&tries);
    }
  }
}

// Bring this rank's part, wait for the others', and compare. Until leave() all parts may be read.
static void meet(struct comm *comm, struct operation operation, const void *in, size_t n) {
  struct slot *ranks = comm->shared->ranks, *own = &ranks[comm->rank];
  comm->number++;
  wait_for_all(comm, operation, 1, comm->number - 1);
  own->operation = operation;
  if (in && n <= LARGEST_COPY) memcpy(own->data, in, n);
  own->arrived = comm->number;
  wait_for_all(comm, operation, 0, comm->number);
  for (int r = 0; r < comm->size; r++) {
    if (!memcmp(&ranks[r].operation, &operation, sizeof operation)) continue;
    begin_complaint(comm, operation, comm->number);
    fprintf(complaint, ": but rank %d came with ", r);
    show(ranks[r].operation);
    end_complaint();
  }
}
static void leave(struct comm *comm) { comm->shared->ranks[comm->rank].left = comm->number; }

// ---------------------------------------------------------------------------------------- reductions

static long double get(const char *data, int type, long i) {
  switch (type) {
    case INT8: return ((int8_t *)data)[i];
    case UINT8: return ((uint8_t *)data)[i];
    case INT32: return ((int32_t *)data)[i];
    case UINT32: return ((uint32_t *)data)[i];
    case INT64: return ((int64_t *)data)[i];
    case UINT64: return ((uint64_t *)data)[i];
    case FLOAT16: return ((_Float16 *)data)[i];
    case FLOAT32: return ((float *)data)[i];
    case FLOAT64: return ((double *)data)[i];
    case BFLOAT16: {
      uint32_t bits = (uint32_t)((uint16_t *)data)[i] << 16;
      float value;
      memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
  return 0;
}
static void put(char *data, int type, long i, long double value) {
  switch (type) {
    case INT8: ((int8_t *)data)[i] = value; break;
    case UINT8: ((uint8_t *)data)[i] = value; break;
    case INT32: ((int32_t *)data)[i] = value; break;
    case UINT32: ((uint32_t *)data)[i] = value; break;
    case INT64: ((int64_t *)data)[i] = value; break;
    case UINT64: ((uint64_t *)data)[i] = value; break;
    case FLOAT16: ((_Float16 *)data)[i] = value; break;
    case FLOAT32: ((float *)data)[i] = value; break;
    case FLOAT64: ((double *)data)[i] = value; break;
    case BFLOAT16: {  // to the nearest, ties to even
      float narrow = value;
      uint32_t bits;
      memcpy(&bits, &narrow, sizeof bits);
      ((uint16_t *)data)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
  }
}
// Elements first .. first+n-1 of all ranks' parts.
static void reduce(struct comm *comm, struct operation operation, long first, long n, char *out) {
  struct slot *ranks = comm->shared->ranks;
  for (long i = 0; i < n; i++) {
    long double sum = get(ranks[0].data, operation.type, first + i);
    for (int r = 1; r < comm->size; r++) {
      long double value = get(ranks[r].data, operation.type, first + i);
      switch (operation.reduction) {
        case PRODUCT: sum *= value; break;
        case MAX: sum = value > sum ? value : sum; break;
        case MIN: sum = value < sum ? value : sum; break;
        default: sum += value;
      }
    }
    put(out, operation.type, i, operation.reduction == AVERAGE ? sum / comm->size : sum);
  }
}

// --------------------------------------------------------------------------------------- collectives

static void copy_small(void *out, const void *in, size_t n) {
  if (n <= LARGEST_COPY && out != in) memmove(out, in, n);
}

int ncclAllReduce(const void *in, void *out, size_t n, int type, int reduction, struct comm *comm,
                  void *stream) {
  struct operation operation = {ALL_REDUCE, type, reduction, 0, n};
  size_t bytes = n * widths[type];
  pretend_count_collective(KIND_ALL_REDUCE, bytes);
  if (!comm->shared) {
    copy_small(out, in, bytes);
    return 0;
  }
  meet(comm, operation, in, bytes);
  if (bytes <= LARGEST_COPY) reduce(comm, operation, 0, n, out);
  leave(comm);
  return 0;
}
int ncclReduce(const void *in, void *out, size_t n, int type, int reduction, int root,
               struct comm *comm, void *stream) {
  struct operation operation = {REDUCE, type, reduction, root, n};
  size_t bytes = n * widths[type];
  pretend_count_collective(KIND_REDUCE, bytes);
  if (!comm->shared) {
    if (comm->rank == root) copy_small(out, in, bytes);
    return 0;
  }
  meet(comm, operation, in, bytes);
  if (bytes <= LARGEST_COPY && comm->rank == root) reduce(comm, operation, 0, n, out);
  leave(comm);
  return 0;
}
int ncclReduceScatter(const void *in, void *out, size_t n, int type, int reduction,
                      struct comm *comm, void *stream) {
  struct operation operation = {REDUCE_SCATTER, type, reduction, 0, n};
  size_t part = n * widths[type], bytes = part * comm->size;
  pretend_count_collective(KIND_REDUCE_SCATTER, bytes);
  if (!comm->shared) {
    copy_small(out, (const char *)in + comm->rank * part, part);
    return 0;
  }
  meet(comm, operation, in, bytes);
  if (bytes <= LARGEST_COPY) reduce(comm, operation, comm->rank * n, n, out);
  leave(comm);
  return 0;
}
int ncclAllGather(const void *in, void *out, size_t n, int type, struct comm *comm, void *stream) {
  struct operation operation = {ALL_GATHER, type, 0, 0, n};
  size_t bytes = n * widths[type];
  pretend_count_collective(KIND_ALL_GATHER, bytes);
  if (comm->shared) meet(comm, operation, in, bytes);
  for (int r = 0; r < comm->size && bytes * comm->size <= LARGEST_COPY; r++) {
    const void *part = comm->shared ? comm->shared->ranks[r].data : in;
    copy_small((char *)out + r * bytes, part, bytes);
  }
  if (comm->shared) leave(comm);
  return 0;
}
int ncclBroadcast(const void *in, void *out, size_t n, int type, int root, struct comm *comm,
                  void *stream) {
  struct operation operation = {BROADCAST, type, 0, root, n};
  size_t bytes = n * widths[type];
  pretend_count_collective(KIND_BROADCAST, bytes);
  if (!comm->shared) {
    if (comm->rank == root) copy_small(out, in, bytes);
    return 0;
  }
  meet(comm, operation, comm->rank == root ? in : NULL, bytes);
  if (bytes <= LARGEST_COPY) memcpy(out, comm->shared->ranks[root].data, bytes);
  leave(comm);
  return 0;
}
int ncclBcast(void *data, size_t n, int type, int root, struct comm *comm, void *stream) {
  return ncclBroadcast(data, data, n, type, root, comm, stream);
}

// ---------- sends and receives: those of a group in any order between pairs, in theirs within a pair

#define LONGEST_QUEUE (1 << 12)
static __thread int group_depth, queued;
static __thread struct entry {
  struct comm *comm;
  struct operation operation;
  void *data;
  int peer, done;
} queue[LONGEST_QUEUE];

static struct box *box_of(struct entry *entry) {
  struct comm *comm = entry->comm;
  return entry->operation.kind == SEND ? box_between(comm, comm->rank, entry->peer)
                                       : box_between(comm, entry->peer, comm->rank);
}
static int try_entry(struct entry *entry) {  // whether it could be done now
  struct operation operation = entry->operation;
  size_t bytes = operation.count * widths[operation.type];
  if (!entry->comm->shared) return 1;
  struct box *box = box_of(entry);
  if (operation.kind == SEND) {
    if (box->sent != box->taken) return 0;
    box->operation = operation;
    if (bytes <= LARGEST_COPY) memcpy(box->data, entry->data, bytes);
    box->sent++;
    return 1;
  }
  if (box->sent == box->taken) return 0;
  if (box->operation.count != operation.count || box->operation.type != operation.type) {
    begin_complaint(entry->comm, operation, box->taken + 1);
    fprintf(complaint, " from rank %d: but it came with ", entry->peer);
    show(box->operation);
    end_complaint();
  }
  if (bytes <= LARGEST_COPY) memcpy(entry->data, box->data, bytes);
  box->taken++;
  return 1;
}
static int is_behind(int k) {  // another of the same pair and direction
  for (int j = 0; j < k; j++)
    if (!queue[j].done && queue[j].comm == queue[k].comm && queue[j].peer == queue[k].peer &&
        queue[j].operation.kind == queue[k].operation.kind)
      return 1;
  return 0;
}
static void run_queue(void) {
  double end = deadline();
  long tries = 0;
  int left = queued;
  while (left) {
    for (int k = 0; k < queued; k++)
      if (!queue[k].done && !is_behind(k) && try_entry(&queue[k])) {
        queue[k].done = 1;
        left--;
      }
    if (!left) break;
    if (now() > end)
      for (int k = 0; k < queued; k++) {
        if (queue[k].done) continue;
        struct box *box = box_of(&queue[k]);
        begin_complaint(queue[k].comm, queue[k].operation, box->taken + 1);
        fprintf(complaint, ": waits for rank %d, in a group of %d; between them %ld sent, %ld taken",
                queue[k].peer, queued, box->sent, box->taken);
        end_complaint();
      }
    doze(&tries);
  }
  queued = 0;
}
static int enqueue(int kind, void *data, size_t n, int type, int peer, struct comm *comm) {
  pretend_count_collective(KIND_SEND_OR_RECEIVE, n * widths[type]);
  if (queued == LONGEST_QUEUE) {
    fprintf(stderr, "pretended NCCL: more than %d calls in a group\n", LONGEST_QUEUE);
    abort();
  }
  queue[queued++] = (struct entry){comm, {kind, type, 0, 0, n}, data, peer, 0};
  if (!group_depth) run_queue();
  return 0;
}
int ncclSend(void *data, size_t n, int type, int peer, struct comm *comm, void *stream) {
  return enqueue(SEND, data, n, type, peer, comm);
}
int ncclRecv(void *data, size_t n, int type, int peer, struct comm *comm, void *stream) {
  return enqueue(RECV, data, n, type, peer, comm);
}
int ncclGroupStart(void) {
  group_depth++;
  return 0;
}
int ncclGroupEnd(void) {
  if (!--group_depth) run_queue();
  return 0;
}
int ncclAlltoAll(char *in, char *out, size_t n, int type, struct comm *comm, void *stream) {
  size_t bytes = n * widths[type];
  ncclGroupStart();
  for (int r = 0; r < comm->size; r++) {
    ncclSend(in + r * bytes, n, type, r, comm, stream);
    ncclRecv(out + r * bytes, n, type, r, comm, stream);
  }
  return ncclGroupEnd();
}

// ---------------- communicators: a file in /dev/shm, named by the key, unlinked as soon as all have it

typedef struct {
  char bytes[128];
} unique_id;

static uint64_t mix(uint64_t hash, const void *data, int n) {  // FNV-1a
  for (int i = 0; i < n; i++) hash = (hash ^ ((unsigned char *)data)[i]) * 1099511628211UL;
  return hash;
}
static int join(struct comm **out, int size, uint64_t key, int rank) {
  const char *alone = getenv("PRETEND_ALONE");
  struct comm *comm = *out = calloc(1, sizeof *comm);
  *comm = (struct comm){size, rank, 0, 0, key, NULL};
  if (alone && *alone == '1') return 0;
  char path[64];
  snprintf(path, sizeof path, "/pretend-nccl-%016lx", key);
  int file = shm_open(path, O_RDWR | O_CREAT, 0600), nobody = 0;
  if (file < 0 || ftruncate(file, shared_bytes(size))) {
    perror("pretended NCCL: shared memory");
    abort();
  }
  comm->shared = mmap(NULL, shared_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                      file, 0);
  close(file);
  if (comm->shared == MAP_FAILED) {
    perror("pretended NCCL: shared memory");
    abort();
  }
  if (!atomic_compare_exchange_strong(&comm->shared->size, &nobody, size) && nobody != size) {
    fprintf(stderr, "pretended NCCL: rank %d joins a communicator of %d, another one of %d\n", rank,
            size, nobody);
    abort();
  }
  meet(comm, (struct operation){JOIN, 0, 0, 0, size}, NULL, 0);
  leave(comm);
  shm_unlink(path);
  return 0;
}

int ncclGetVersion(int *version) {
  *version = 22907;
  return 0;
}
int ncclGetUniqueId(unique_id *id) { return getrandom(id, sizeof *id, 0) < 0; }
int ncclCommInitRank(struct comm **out, int size, unique_id id, int rank) {
  return join(out, size, mix(14695981039346656037UL, &id, sizeof id), rank);
}
int ncclCommInitRankConfig(struct comm **out, int size, unique_id id, int rank, void *config) {
  return ncclCommInitRank(out, size, id, rank);
}
int ncclCommInitRankScalable(struct comm **out, int size, int rank, int ids_count, unique_id *ids,
                             void *config) {
  return ncclCommInitRank(out, size, ids[0], rank);
}
int ncclCommSplit(struct comm *comm, int color, int key, struct comm **out, void *config) {
  if (!comm->shared) {
    fprintf(stderr, "pretended NCCL: a rank that is alone cannot split a communicator\n");
    abort();
  }
  int own[2] = {color, key}, size = 0, rank = 0;
  meet(comm, (struct operation){SPLIT, INT32, 0, 0, 2}, own, sizeof own);
  for (int r = 0; r < comm->size; r++) {
    int *other = (int *)comm->shared->ranks[r].data;
    if (other[0] != color) continue;
    size++;
    rank += other[1] < key || (other[1] == key && r < comm->rank);
  }
  leave(comm);
  comm->splits++;
  *out = NULL;
  if (color < 0) return 0;
  uint64_t joined = mix(mix(comm->key, &comm->splits, sizeof(int)), &color, sizeof color);
  return join(out, size, joined, rank);
}
int ncclCommDestroy(struct comm *comm) {
  if (comm && comm->shared) munmap(comm->shared, shared_bytes(comm->size));
  free(comm);
  return 0;
}
int ncclCommAbort(struct comm *comm) { return ncclCommDestroy(comm); }
int ncclCommCount(struct comm *comm, int *size) {
  *size = comm->size;
  return 0;
}
int ncclCommUserRank(struct comm *comm, int *rank) {
  *rank = comm->rank;
  return 0;
}
int ncclCommGetAsyncError(struct comm *comm, int *error) { return *error = 0; }
int ncclRedOpCreatePreMulSum(int *out, void *scalar, int type, int where, struct comm *comm) {
  *out = 5;
  return 0;
}
const char *ncclGetErrorString(int error) { return "an error of the pretended NCCL"; }
const char *ncclGetLastError(void *comm) { return "none"; }
