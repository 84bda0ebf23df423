/* The protocol of kernels/csrc/allreduce_protocol.cuh between two ranks, for spin.
 *
 *   here                                          there
 *   Block, one per block of a rank's kernel       all_reduce: push, clear_old, collect, finish
 *   mem    inboxes, in halves of 8 bytes          Line; each half has a generation of its own
 *   wire   halves under way, that arrive late     store_line: relaxed, so in any order within a
 *          and in any order, or never             line, between lines, even at one address
 *   wipe   clears under way to the own inbox      clear_old, until fence_system
 *
 * A half holds the number of the call that sent it, 0 if it is empty; the reader looks only at that
 * call's generation: FIRST, FIRST + 1, .. TOP, 2, 3, .. TOP is 2^32 - 1 there. Old lines are cleared
 * within EVERY * WINDOWS calls, 65536 there. How many lines a message has is chosen in each call.
 *
 * Without a fault no deadline passes, so a wait without end is an invalid end state, and both ranks
 * must return every sum. Faults, one of: DEATH of rank 0 at any time; SLOW; up to LOSSES halves lost;
 * SKIPS, rank 0 leaves a call out. From then on a deadline may pass at any time, also too early.
 * Nothing here goes in circles: without an invalid end state every wait ends.
 *
 * tests/kernels/test_allreduce_model.py checks it, and that each BUG_* is found.
 */

#ifndef LINES
#define LINES 2
#endif
#ifndef BLOCKS
#define BLOCKS 1 /* a block handles lines b, b + BLOCKS, ... */
#endif
#ifndef HALVES
#define HALVES 2 /* 1: those of a line arrive together */
#endif
#ifndef CALLS
#define CALLS 4
#endif
#ifndef FIRST
#define FIRST 1
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef TOP
#define TOP 13 /* odd, as 2^32 - 1 */
#endif

#ifdef BUG_ONE_SLOT
#define SLOTS 1
#else
#define SLOTS 2
#endif
#ifdef BUG_ZERO_NOT_SKIPPED
#define AGAIN 0
#elif defined(BUG_WRAP_TO_ONE)
#define AGAIN 1
#else
#define AGAIN 2
#endif

#define SLOT(g) ((g) % SLOTS)
#define NEXT(g) ((g) == TOP -> AGAIN : (g) + 1)
/* Of call k; of an empty half: 0. */
#define UNWRAPPED(k) (FIRST + (k) - 1)
#define GENERATION(k) \
    ((k) == 0 -> 0 \
     : (UNWRAPPED(k) <= TOP -> UNWRAPPED(k) : AGAIN + (UNWRAPPED(k) - TOP - 1) % (TOP + 1 - AGAIN)))

/* A place for a half: whose inbox, slot, line, half. */
#define PLACE(r, slot, line, half) ((((r) * SLOTS + (slot)) * LINES + (line)) * HALVES + (half))
#define PLACES (2 * SLOTS * LINES * HALVES)
#define READER(place) ((place) / (SLOTS * LINES * HALVES))
#define LINE(place) ((place) / HALVES % LINES)
/* Two halves may be on their way to one place: those of one call and of the next that uses it. */
#define ON_WIRE(place, k) ((place) * 2 + ((k) / SLOTS) % 2)

byte mem[PLACES];
byte wire[2 * PLACES];
bit wipe[PLACES];
byte num_wipes[2]; /* of a rank, on their way */

byte generation[2] = FIRST;
byte arrived[2];
bit aborted[2];
byte ended[2]; /* blocks of all calls that have ended: stream order */

/* For the properties only. */
bit record[2];         /* who waited for what is written */
byte completed[2];     /* calls that returned a sum */
byte taken[2 * LINES]; /* last call whose line the reader has read */
byte num_taken[2];     /* lines read in the running call */

bit fault;
byte num_lost;
bit dead[2];
byte num_calls[2] = CALLS;
byte skipped[2] = 255; /* the call that a rank leaves out; 255: none */

/* Lines of a message: chosen by the rank that gets there first, 0 before. */
#ifdef SKIPS
#define KEPT (CALLS + 2)
#else
#define KEPT 4
#endif
#define AT(k) ((k) % KEPT)
byte message[KEPT];
/* As the caller counts: a rank that left a call out is one ahead. */
#define LOGICAL(r, k) ((k) >= skipped[r] -> (k) + 1 : (k))

inline choose_size(logical)
{
    if
    :: message[AT(logical)] -> skip
    :: else ->
        if
        :: message[AT(logical)] = 1
        :: message[AT(logical)] = LINES
        fi;
#ifndef SKIPS
        message[AT(logical + 1)] = 0 /* of three calls ago: no rank is there any more */
#endif
    fi
}

inline push(r, b, k, g, size)
{
    line = b;
    do
    :: line < size ->
        half = 0;
        do
        :: half < HALVES ->
            place = PLACE(1 - r, SLOT(g), line, half);
            /* What was sent there before has arrived: it has been read. */
            assert(fault || (!wire[ON_WIRE(place, 0)] && !wire[ON_WIRE(place, SLOTS)]));
            wire[ON_WIRE(place, k)] = k;
            half++
        :: else -> break
        od;
        line = line + BLOCKS
    :: else -> break
    od;
    line = 0; half = 0; place = 0
}

/* Each pair of generations clears a window, which is one line here, in both slots. */
#define EVERY 2
#define WINDOWS LINES
inline clear_old(r, b, g, size)
{
#ifdef BUG_NO_CLEAR
    skip
#else
    line = (g / EVERY) % WINDOWS;
    if
    :: b == 0 && line >= size ->
        half = 0;
        do
        :: half < HALVES ->
            place = PLACE(r, SLOT(g), line, half);
            assert(!wipe[place]);
            wipe[place] = 1;
            num_wipes[r]++;
            half++
        :: else -> break
        od
    :: else
    fi;
    line = 0; half = 0; place = 0
#endif
}

#define FRESH(r, g, line, half) (GENERATION(mem[PLACE(r, SLOT(g), line, half)]) == (g))
#ifdef BUG_ONE_GENERATION
#define READY(r, g, line) FRESH(r, g, line, HALVES - 1)
#else
#define READY(r, g, line) (FRESH(r, g, line, 0) && FRESH(r, g, line, HALVES - 1))
#endif

inline take(r, k, g, line)
{
    /* The sum is of this call and of no other, in both halves. */
    assert(mem[PLACE(r, SLOT(g), line, 0)] == k);
    assert(mem[PLACE(r, SLOT(g), line, HALVES - 1)] == k);
    taken[r * LINES + line] = k;
    num_taken[r]++
}

inline give_up(r)
{
    if
    :: aborted[r] -> skip /* another block has written the record */
    :: else ->
        aborted[r] = 1;
        assert(!record[r]);
        record[r] = 1
    fi
}

inline finish(r, size)
{
    arrived[r]++;
    if
    :: arrived[r] == BLOCKS ->
        arrived[r] = 0;
        generation[r] = NEXT(generation[r]);
        assert(num_taken[r] == size);
        num_taken[r] = 0;
        completed[r]++
    :: else
    fi
}

proctype Block(byte r; byte b)
{
    byte k = 1;
    byte g, size, line, half, place;

    do
    :: k > num_calls[r] -> break
    :: else ->
        if
        :: ended[r] >= BLOCKS * (k - 1)
        :: dead[r] -> goto gone
        fi;
#ifndef BUG_NOT_STICKY
        if
        :: atomic { aborted[r] -> goto returned }
        :: else
        fi;
#endif
        /* One step: no other block of the rank writes what is read, and `wire` keeps no order. */
        atomic {
            size = LOGICAL(r, k);
            choose_size(size);
            size = message[AT(size)];
            g = generation[r];
            assert(g == GENERATION(k));
            push(r, b, k, g, size);
            clear_old(r, b, g, size)
        }
        line = b;
        do
        :: line < size ->
            if
            :: atomic { READY(r, g, line) && !dead[r] -> take(r, k, g, line); line = line + BLOCKS }
#ifndef BUG_NO_DEADLINE
            :: atomic { fault && !dead[r] -> give_up(r); goto returned }
#endif
            :: atomic { aborted[r] -> goto returned }
            :: dead[r] -> goto gone
            fi
        :: else -> break
        od;
        line = 0;
#ifndef BUG_NO_FENCE
        if
        :: b != 0 || num_wipes[r] == 0
        :: dead[r] -> goto gone
        fi;
#endif
        atomic { finish(r, size) }
returned:
        atomic { line = 0; size = 0; g = 0; ended[r]++; k++ }
    od;
    /* A rank that returned fewer sums than it was asked for has said so; without a fault none has. */
    assert(ended[r] < BLOCKS * num_calls[r] || completed[r] == num_calls[r] || record[r]);
    assert(fault || !record[r]);
gone:
    skip
}

#define ARRIVES(place, i) \
    :: d_step { wire[2 * (place) + i] -> \
        /* No half is overwritten before its reader took it. */ \
        assert(mem[place] <= taken[READER(place) * LINES + LINE(place)] \
               || skipped[0] != 255); /* then sizes differ: a line may have no reader */ \
        mem[place] = wire[2 * (place) + i]; \
        wire[2 * (place) + i] = 0 }
/* A rank that dies while it pushes leaves any part of its halves unsent. */
#define LOST(place, i) \
    :: d_step { wire[2 * (place) + i] && (num_lost < LOSSES || dead[1 - READER(place)]) -> \
        wire[2 * (place) + i] = 0; \
        if \
        :: dead[1 - READER(place)] \
        :: else -> num_lost++; fault = 1 \
        fi }
#define WIPED(place) \
    :: d_step { wipe[place] -> mem[place] = 0; wipe[place] = 0; num_wipes[READER(place)]-- }
#define AT_PLACE(place) \
    ARRIVES(place, 0) \
    ARRIVES(place, 1) \
    LOST(place, 0) \
    LOST(place, 1) \
    WIPED(place)

proctype Link()
{
end:
    do
    AT_PLACE(0)
    AT_PLACE(1)
    AT_PLACE(2)
    AT_PLACE(3)
    AT_PLACE(4)
    AT_PLACE(5)
    AT_PLACE(6)
    AT_PLACE(7)
#if SLOTS * HALVES == 4
    AT_PLACE(8)
    AT_PLACE(9)
    AT_PLACE(10)
    AT_PLACE(11)
    AT_PLACE(12)
    AT_PLACE(13)
    AT_PLACE(14)
    AT_PLACE(15)
#endif
    od
}

#if defined(DEATH) || defined(SLOW)
proctype Fault() /* at any time */
{
#ifdef DEATH
    atomic { dead[0] = 1; fault = 1 }
#else
    fault = 1
#endif
}
#endif

init
{
    atomic {
#ifdef SKIPS
        fault = 1;
        num_calls[0]--;
        byte at;
        select(at : 1 .. CALLS);
        skipped[0] = at;
#endif
        byte b = 0;
        do
        :: b < BLOCKS -> run Block(0, b); run Block(1, b); b++
        :: else -> break
        od;
        run Link();
#if defined(DEATH) || defined(SLOW)
        run Fault()
#endif
    }
}
