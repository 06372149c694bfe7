// Copyright 2026 The ovr_fast authors. SPDX-License-Identifier: Apache-2.0
//
// Inside the runtime library alone.
#ifndef OVR_FAST_RUNTIME_H
#define OVR_FAST_RUNTIME_H

#include "card.h"

extern struct pretend_counts counts;
int pretend_physical_device(int device);  // what CUDA_VISIBLE_DEVICES means by it
void count_wait(const char *what);

#endif
