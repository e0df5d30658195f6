/* place.h: which GPU and which cores each process of a plan runs on. */
#ifndef BATON_PLACE_H
#define BATON_PLACE_H

#include "deploy/gpus.h"
#include "deploy/plan.h"

/* N of the --device cuda:N that a process gets by flag or environment; -1 on the CPU. */
int place_gpu(const struct plan_proc *p);
bool place_wants_gpus(const struct plan *p);

/* With --pin auto, gives every worker of a GPU the cores on its GPU's memory node; several workers
 * of one node divide them. allowed: what we may use at all. What is not known is left alone, with a
 * reason in p->place_note. sys: "/sys", or a directory like it. */
void place_pin(struct plan *p, const struct gpus *gpus, const char *sys, const cpu_set_t *allowed);

/* Settings of CUDA and NCCL for a cluster on one host; what the caller's environment says wins. */
void place_environment(void);

/* All of it, for this machine. */
void place(struct plan *p);

#endif
