// C ABI of the one-shot all-reduce and of the link probe: two processes, one GPU each, that exchange
// lines of 16 bytes through memory both have mapped. Pinned host memory or a peer's device memory:
// the kernels are the same, only the pointers differ.
//
// Plain pointers, sizes and a CUDA stream; no torch. Functions that return int return a cudaError_t
// (0 is success). Every wait inside a kernel ends at a deadline: see Dsv4WaitRecord.
//
// A line is {payload 0, generation, payload 1, generation}, four words of 32 bits. Each aligned half
// of 8 bytes carries its own generation, so the reader needs no more than that 8 aligned bytes arrive
// whole: a line torn in the middle shows two different generations and is read again. (A checksum, or
// one flag for 16 bytes, would need either more instructions or a promise that PCIe does not make;
// one flag for 128 bytes is safe over NVLink only.)
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DSV4_MAX_RANKS 8
#define DSV4_ALLREDUCE_MAX_BYTES (512 * 1024)  // of a call
#define DSV4_IPC_HANDLE_BYTES 64

// ---------------------------------------------------------------- all-reduce

// Who waited for what when the deadline passed. In pinned host memory.
typedef struct {
  uint32_t written;     // 1 when all that follows is valid; the last word to be written
  uint32_t rank;        // who waited
  uint32_t source;      // for which rank's line
  uint32_t operation;   // 1: all_reduce
  uint32_t generation;  // of the call
  uint32_t expected;    // generation that the line should carry
  uint32_t seen[2];     // what its two halves carry
  uint32_t block;       // of the kernel
  uint32_t line;        // index in the message, 8 bytes of payload each
  uint32_t num_bytes;   // of the message
  uint32_t reserved;
  uint64_t waited_ns;
} Dsv4WaitRecord;

#define DSV4_HASH_ENTRIES 4

typedef struct {
  Dsv4WaitRecord record;
  uint32_t completed;  // generation of the last call that ended well
  uint32_t reserved;
  // Of calls whose generation is a multiple of hash_every: (hash of the sums) << 32 | generation, in
  // turn. Ranks whose hashes of one generation differ were given different data.
  uint64_t hash[DSV4_HASH_ENTRIES];
} Dsv4Control;

// In device memory of the rank, written by its kernels alone: what makes a replayed graph right.
typedef struct {
  uint32_t generation;  // of the next call; never 0, the generation of an empty line
  uint32_t arrived;     // blocks of the running call that have ended
  uint32_t aborted;     // sticky: later calls return at once
  uint32_t hash;        // of the running call, added up by its threads
} Dsv4State;

typedef struct {
  const void* in;                 // BF16, 16-byte aligned
  void* out;                      // BF16, 16-byte aligned; may be `in`
  Dsv4State* state;
  Dsv4Control* control;
  void* inbox[DSV4_MAX_RANKS];    // inbox[r]: where rank r polls, dsv4_allreduce_inbox_bytes of it
  int64_t deadline_ns;
  int32_t num_bytes;              // multiple of 16, at most max_bytes; 0 launches nothing
  int32_t max_bytes;              // multiple of 256; what the inboxes were made for
  int32_t rank;
  int32_t world_size;
  int32_t num_blocks;             // 0: chosen from num_bytes
  int32_t hash_every;             // generations; 0: never
} Dsv4AllReduceArgs;

// Bytes of one inbox: [2 slots][world_size - 1 sources][max_bytes / 8 lines][16]. 0: not supported.
// Must be zero before the first call.
size_t dsv4_allreduce_inbox_bytes(int32_t world_size, int32_t max_bytes);

// out = sum over ranks of in, in FP32 in the order of ranks, rounded once: the same bits on all ranks.
// All ranks make the same calls in the same order, on one stream each (or ordered by events).
int dsv4_allreduce(const Dsv4AllReduceArgs* args, void* stream);

// --------------------------------------------------------------------- probe

// One block's part. In pinned host memory, zeroed before the launch.
typedef struct {
  uint32_t status;  // 0: did not end; 1: all rounds done; 2: a wait passed the deadline
  uint32_t rounds;  // done
  uint32_t wrong;   // threads that saw wrong data, summed over rounds
  uint32_t wrong_round, wrong_line;  // of the first one
  uint32_t expected[4], seen[4];
  uint32_t flag_seen;    // by the wait that passed the deadline
  uint32_t reserved[2];
  uint64_t elapsed_ns;   // of the timed rounds, as the initiator sees them
} Dsv4ProbeResult;

// Rounds of: the initiator writes data and raises the other's flag; the other checks the data,
// writes its own, and raises the initiator's flag. Blocks are independent of each other.
typedef struct {
  void* write_data;       // num_blocks * send_lines lines of 16 bytes; all payload
  const void* read_data;  // num_blocks * check_lines
  void* my_flags;         // polled; num_blocks of them, 128 bytes apart, zero before the launch
  void* peer_flags;
  Dsv4ProbeResult* results;  // [num_blocks]
  int64_t deadline_ns;
  int32_t send_lines, check_lines;  // per block; 0: a flag alone
  int32_t rounds, untimed_rounds;
  int32_t num_blocks;
  int32_t initiator;  // 1 or 0
} Dsv4ProbeArgs;

#define DSV4_PROBE_FLAG_STRIDE 128
int dsv4_probe(const Dsv4ProbeArgs* args, void* stream);

// -------------------------------------------------------------------- memory

int dsv4_device_count(int32_t* count);
int dsv4_set_device(int32_t device);
int dsv4_device_bus_id(int32_t device, char* text, int32_t size);
int dsv4_synchronize(void);
// Registers mapped memory (Portable | Mapped); gives the address that kernels use.
int dsv4_host_register(void* pointer, size_t bytes, void** device_pointer);
int dsv4_host_unregister(void* pointer);
// Zeroed memory of the current device, an allocation of its own: what an IPC handle can name.
int dsv4_device_alloc(size_t bytes, void** pointer);
int dsv4_device_free(void* pointer);
// To and from the addresses that kernels use, of either kind of memory. They wait.
int dsv4_device_write(void* pointer, const void* from, size_t bytes);
int dsv4_device_read(void* to, const void* pointer, size_t bytes);
int dsv4_ipc_export(void* pointer, void* handle);
int dsv4_ipc_open(const void* handle, void** pointer);
int dsv4_ipc_close(void* pointer);

#ifdef __cplusplus
}
#endif
