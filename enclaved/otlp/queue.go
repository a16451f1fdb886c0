package otlp

import (
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/proto"
)

// queue holds what waits to be sent: at most queueBytes, encoded. What comes when it is full is dropped.
type queue[T proto.Message] struct {
	count   func(T) uint64
	dropped atomic.Uint64

	mu     sync.Mutex
	filled sync.Cond
	items  []T
	sizes  []int
	bytes  int
	closed bool
}

func newQueue[T proto.Message](count func(T) uint64) *queue[T] {
	q := &queue[T]{count: count}
	q.filled.L = &q.mu
	return q
}

func (q *queue[T]) add(item T) {
	size := proto.Size(item)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.bytes+size > queueBytes {
		q.dropped.Add(q.count(item))
		return
	}
	q.items, q.sizes = append(q.items, item), append(q.sizes, size)
	q.bytes += size
	q.filled.Signal()
}

// take waits for items and removes a batch of them. It returns nil when the queue is closed and empty.
func (q *queue[T]) take() (batch []T, count uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 {
		if q.closed {
			return nil, 0
		}
		q.filled.Wait()
	}
	n, bytes := 0, 0
	for n < len(q.items) && (n == 0 || bytes+q.sizes[n] <= batchBytes) {
		bytes += q.sizes[n]
		count += q.count(q.items[n])
		n++
	}
	batch = append(batch, q.items[:n]...)
	q.items, q.sizes = append([]T(nil), q.items[n:]...), append([]int(nil), q.sizes[n:]...)
	q.bytes -= bytes
	return batch, count
}

// close lets take return what is left, and then nil.
func (q *queue[T]) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.filled.Broadcast()
}
