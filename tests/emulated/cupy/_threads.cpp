// A block's threads, as coroutines that take turns in a random order.
//
// A thread runs until it comes to a barrier, of its block or of its warp. When every thread waits, those go on
// whose barrier is complete. One that reads what another has not written yet, or writes what another has still
// to read, does so in one order or the other, and finds NaN or another number than it should.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { WARP = 32, MOST = 1024, STACK = (17 << 12) + 320, QUEUE = 256, SHARED = 256 << 10, GUARD = 64 << 10 };
enum State { READY, AT_BLOCK, AT_SHUFFLE, AT_TILES, DONE };

struct Index {
  unsigned x;
};
struct Copy {
  char* to;
  const char* from;
  int group;
};
// What a thread brings to its warp, and takes from it.
struct Lane {
  uint64_t bits, found;
  int by;
  uint32_t a[4], b[2];
  float c[4], d[4];
};
struct Thread {
  jmp_buf at;
  bool begun;
};
struct Queue {  // of copies under way, the oldest first
  int count, group;
  Copy copies[QUEUE];
};

extern "C" {
Index threadIdx, blockIdx;
char* dynamic_shared;
}

static State states[MOST];
static Lane lanes[MOST];
static Thread threads[MOST];
static Queue queues[MOST];
static ucontext_t births[MOST];
static jmp_buf scheduler;
static sigjmp_buf fault;
static void (*kernel)(void**);
static void** kernel_args;
static size_t dynamic_bytes;
static char* said;
static uint32_t dice;

[[noreturn]] static void give_up(const char* format, ...) {
  va_list args;
  va_start(args, format);
  int n = snprintf(said, 128, "thread %u of block %u: ", threadIdx.x, blockIdx.x);
  vsnprintf(said + n, 256 - n, format, args);
  siglongjmp(fault, 1);
}

static void by_signal(int number) {
  give_up("%s", number == SIGSEGV || number == SIGBUS ? "an address out of reach"
                : number == SIGFPE                    ? "a division by zero"
                : number == SIGVTALRM                 ? "it does not come to an end"
                                                      : "undefined behaviour (bounds, alignment, overflow, shift)");
}

static uint32_t thrown() {  // xorshift
  dice ^= dice << 13, dice ^= dice >> 17, dice ^= dice << 5;
  return dice;
}

static void shuffle(unsigned* of, unsigned n) {
  for (unsigned i = n; i > 1; i--) {
    unsigned j = thrown() % i, v = of[i - 1];
    of[i - 1] = of[j], of[j] = v;
  }
}

static void wait_as(State state) {
  unsigned t = threadIdx.x;
  states[t] = state;
  if (!_setjmp(threads[t].at)) _longjmp(scheduler, 1);
}

static void whole_life() {
  for (;;) {
    kernel(kernel_args);
    wait_as(DONE);
  }
}

static void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(scheduler)) return;
  if (threads[t].begun) _longjmp(threads[t].at, 1);
  threads[t].begun = true;
  setcontext(births + t);
}

static float cut(double v) {  // to 24 digits, towards zero
  float f = v;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((f > v && v > 0) || (f < v && v < 0)) bits--;
  memcpy(&f, &bits, 4);
  return f;
}

static double seen(uint32_t bits) {  // of a factor: 11 digits
  bits &= 0xffffe000u;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// d (16 x 8) = a (16 x 8) b (8 x 8) + c, each lane with its parts (PTX ISA, mma.m16n8k8).
static void multiply_tiles(Lane* warp) {
  double a[16][8], b[8][8], d[16][8];
  for (int l = 0; l < WARP; l++) {
    int g = l / 4, q = l % 4;
    for (int e = 0; e < 4; e++) a[g + 8 * (e % 2)][q + 4 * (e / 2)] = seen(warp[l].a[e]);
    for (int e = 0; e < 2; e++) b[q + 4 * e][g] = seen(warp[l].b[e]);
    for (int e = 0; e < 4; e++) d[g + 8 * (e / 2)][2 * q + e % 2] = warp[l].c[e];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 8; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < WARP; l++)
    for (int e = 0; e < 4; e++) warp[l].d[e] = cut(d[l / 4 + 8 * (e / 2)][2 * (l % 4) + e % 2]);
}

static bool go_on(unsigned count) {  // whether anybody does
  bool any = false, all = true;
  for (unsigned first = 0; first < count; first += WARP) {
    unsigned stop = first + WARP < count ? first + WARP : count, same = 0;
    State state = states[first];
    for (unsigned t = first; t < stop; t++) same += states[t] == state;
    if ((state == AT_SHUFFLE || state == AT_TILES) && same == WARP) {
      if (state == AT_TILES) multiply_tiles(lanes + first);
      for (unsigned t = first; t < stop; t++) {
        if (state == AT_SHUFFLE) lanes[t].found = lanes[t ^ lanes[t].by].bits;
        states[t] = READY;
      }
      any = true;
    }
    for (unsigned t = first; t < stop; t++) all = all && (states[t] == AT_BLOCK || states[t] == DONE);
  }
  if (any || !all) return any;
  for (unsigned t = 0; t < count; t++)
    if (states[t] == AT_BLOCK) states[t] = READY, any = true;
  return any;
}

static void run_block(unsigned count) {
  static unsigned order[MOST];
  for (unsigned t = 0; t < count; t++) states[t] = READY, queues[t].count = queues[t].group = 0;
  do {
    unsigned ready = 0;
    for (unsigned t = 0; t < count; t++)
      if (states[t] == READY) order[ready++] = t;
    shuffle(order, ready);
    for (unsigned i = 0; i < ready; i++) resume(order[i]);
  } while (go_on(count));
  for (unsigned t = 0; t < count; t++) {
    threadIdx.x = t;
    if (states[t] != DONE) give_up("it waits for threads that do not come");
  }
}

extern "C" {

void __syncthreads() { wait_as(AT_BLOCK); }

uint64_t of_lane(unsigned mask, uint64_t mine, int by) {
  if (mask != 0xffffffffu || by < 0 || by >= WARP) give_up("a shuffle that is not emulated");
  Lane& lane = lanes[threadIdx.x];
  lane.bits = mine;
  lane.by = by;
  wait_as(AT_SHUFFLE);
  return lane.found;
}

void tile_product(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  Lane& lane = lanes[threadIdx.x];
  memcpy(lane.a, a, sizeof lane.a);
  memcpy(lane.b, b, sizeof lane.b);
  memcpy(lane.c, c, sizeof lane.c);
  wait_as(AT_TILES);
  memcpy(d, lane.d, sizeof lane.d);
}

unsigned place_in_shared(const void* p) {
  size_t at = (const char*)p - dynamic_shared;
  if (at >= dynamic_bytes) give_up("an address that is not in the shared memory of this launch");
  return at;
}

// As late as may be; until then there is NaN.
void copy_later(unsigned to, const void* from, int bytes, int from_there) {
  if (bytes != 16 || to % 16 || (size_t)to + 16 > dynamic_bytes) give_up("a copy to %u of shared memory", to);
  if (from_there && (from_there != 16 || (uintptr_t)from % 16)) give_up("a copy from %p", from);
  Queue& queue = queues[threadIdx.x];
  if (queue.count == QUEUE) give_up("more than %d copies under way", QUEUE);
  queue.copies[queue.count++] = {dynamic_shared + to, from_there ? (const char*)from : nullptr, queue.group};
  memset(dynamic_shared + to, 0xff, 16);
}

void copies_belong_together() { queues[threadIdx.x].group++; }

void wait_for_copies(int pending) {
  if (pending < 0) give_up("a wait for all but %d copies", pending);
  Queue& queue = queues[threadIdx.x];
  int kept = 0;
  for (int i = 0; i < queue.count; i++) {
    Copy& copy = queue.copies[i];
    if (copy.group >= queue.group - pending) {
      queue.copies[kept++] = copy;
    } else if (copy.from) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  queue.count = kept;
}

// Whether it ran; if not, `message` (256) says why. Static shared memory is from `begin` to `end`.
int emulate(void (*run)(void**), void** args, unsigned blocks, unsigned count, size_t shared, char* begin,
            char* end, unsigned seed, unsigned seconds, char* message) {
  static char* memory = nullptr;
  if (!memory) {
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char* stacks = (char*)mmap(nullptr, (size_t)MOST * STACK, PROT_READ | PROT_WRITE, how, -1, 0);
    memory = (char*)mmap(nullptr, SHARED + GUARD, PROT_READ | PROT_WRITE, how, -1, 0);
    mprotect(memory + SHARED, GUARD, PROT_NONE);
    for (int t = 0; t < MOST; t++) {
      getcontext(births + t);
      births[t].uc_stack.ss_sp = stacks + (size_t)t * STACK;
      births[t].uc_stack.ss_size = STACK;
      makecontext(births + t, whole_life, 0);
    }
  }
  kernel = run, kernel_args = args, said = message, dice = seed | 1, dynamic_bytes = shared;
  threadIdx.x = blockIdx.x = 0;
  dynamic_shared = memory + SHARED - (shared + 15) / 16 * 16;

  struct sigaction ours = {}, before[6];
  int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
  ours.sa_handler = by_signal;
  ours.sa_flags = SA_NODEFER;
  for (int i = 0; i < 6; i++) sigaction(signals[i], &ours, before + i);
  timer_t timer;  // of this thread of the host alone
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = gettid();
  struct itimerspec longest = {{0, 0}, {seconds, 0}};
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
  timer_settime(timer, 0, &longest, nullptr);
  volatile int ran = 0;
  unsigned* volatile order = (unsigned*)malloc(blocks * sizeof(unsigned));
  if (!sigsetjmp(fault, 1)) {
    if (!count || count > MOST || !blocks || shared > SHARED) give_up("such a launch there is not");
    for (unsigned i = 0; i < blocks; i++) order[i] = i;
    shuffle(order, blocks);
    for (unsigned i = 0; i < blocks; i++) {
      blockIdx.x = order[i];
      memset(dynamic_shared, 0xff, (shared + 15) / 16 * 16);
      memset(begin, 0xff, end - begin);
      run_block(count);
    }
    ran = 1;
  } else {
    for (int t = 0; t < MOST; t++) threads[t].begun = false;
  }
  free(order);
  timer_delete(timer);
  for (int i = 0; i < 6; i++) sigaction(signals[i], before + i, nullptr);
  return ran;
}
}
