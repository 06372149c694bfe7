// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// A libnvidia-ml.so.1, enough for a program that looks for cards before it starts CUDA, as vLLM
// does. It counts all cards, whatever CUDA_VISIBLE_DEVICES says, as the real one.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "an error of the pretended card"; }

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
  snprintf(text, length, "580.00");
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  *version = CUDA_VERSION_REPORTED;
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
  const char *all = getenv("PRETEND_GPUS");
  *count = all ? atoi(all) : 1;
  return 0;
}
// A handle is the card's number and one.
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
  *out = (void *)(index + 1UL);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **out) {
  *out = (void *)(1UL + strtoul(strchr(text, ':') + 1, NULL, 16));
  return 0;
}
int nvmlDeviceGetIndex(void *handle, unsigned *index) {
  *index = (unsigned long)handle - 1;
  return 0;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned length) {
  snprintf(text, length, "%s", CARD_NAME);
  return 0;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) {
  snprintf(text, length, "GPU-00000000-0000-0000-0000-%012lx", (unsigned long)handle);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = CARD_MAJOR;
  *minor = CARD_MINOR;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *total_free_used) {
  total_free_used[0] = total_free_used[1] = CARD_BYTES;
  total_free_used[2] = 0;
  return 0;
}
int nvmlDeviceGetP2PStatus(void *one, void *other, int what, int *status) { return *status = 0; }

// What torch asks when a card is full: which processes have how much. None is named.
int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *infos) {
  *count = 0;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *infos) {
  *count = 0;
  return 0;
}
// And over which links cards see each other: none (NVML_ERROR_NOT_SUPPORTED).
int nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned link, int *type) { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned link, void *info) { return 3; }
int nvmlDeviceGetGpuFabricInfoV(void *handle, void *info) { return 3; }
