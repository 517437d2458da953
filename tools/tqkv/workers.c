/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One call at a time. All threads, the caller too, take the next index until none is left. A
 * thread that wakes late finds no index and touches nothing; the caller returns when every thread
 * has left the call.
 */
#include "workers.h"

#include <pthread.h>
#include <stdlib.h>

#include "tool.h"

struct workers {
    tqkv_parallel parallel;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t *threads;
    size_t n_threads; /* started ones */
    size_t n_inside;  /* started threads that have not left the call */
    uint64_t call;    /* number of the call */
    bool is_ending;
    size_t next, n_tasks;
    tqkv_task_fn *fn;
    void *task;
};

typedef struct start {
    workers *w;
    size_t index;
} start;

/* Called with the lock held; returns with it held. */
static void take_tasks(workers *w, size_t worker)
{
    while (w->next < w->n_tasks) {
        const size_t i = w->next++;
        pthread_mutex_unlock(&w->lock);
        w->fn(w->task, i, worker);
        pthread_mutex_lock(&w->lock);
    }
}

static void *thread_main(void *arg)
{
    start *s = arg;
    workers *w = s->w;
    const size_t worker = s->index;
    uint64_t seen = 0;
    free(s);
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->call == seen && !w->is_ending)
            pthread_cond_wait(&w->work, &w->lock);
        if (w->is_ending)
            break;
        seen = w->call;
        take_tasks(w, worker);
        if (--w->n_inside == 0)
            pthread_cond_signal(&w->done);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

static void run(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    workers *w = user;
    pthread_mutex_lock(&w->lock);
    w->next = 0;
    w->n_tasks = n_tasks;
    w->fn = fn;
    w->task = task;
    w->n_inside = w->n_threads;
    w->call++;
    pthread_cond_broadcast(&w->work);
    take_tasks(w, 0);
    while (w->n_inside)
        pthread_cond_wait(&w->done, &w->lock);
    pthread_mutex_unlock(&w->lock);
}

workers *workers_create(uint32_t n_threads)
{
    workers *w = tool_alloc(1, sizeof(*w));
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->work, NULL);
    pthread_cond_init(&w->done, NULL);
    w->threads = tool_alloc(n_threads, sizeof(*w->threads));
    for (size_t i = 1; i < n_threads; i++) {
        start *s = tool_alloc(1, sizeof(*s));
        *s = (start){.w = w, .index = i};
        if (pthread_create(&w->threads[w->n_threads], NULL, thread_main, s) != 0) {
            free(s);
            break; /* fewer threads do the same work */
        }
        w->n_threads++;
    }
    w->parallel = (tqkv_parallel){.user = w, .n_workers = w->n_threads + 1, .run = run};
    return w;
}

void workers_destroy(workers *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->is_ending = true;
    pthread_cond_broadcast(&w->work);
    pthread_mutex_unlock(&w->lock);
    for (size_t i = 0; i < w->n_threads; i++)
        pthread_join(w->threads[i], NULL);
    pthread_cond_destroy(&w->work);
    pthread_cond_destroy(&w->done);
    pthread_mutex_destroy(&w->lock);
    free(w->threads);
    free(w);
}

const tqkv_parallel *workers_parallel(const workers *w)
{
    return &w->parallel;
}
