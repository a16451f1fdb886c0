package otlp

import (
	"sync"
	"time"
)

// Batch gathers items that shall go on together: as soon as there are Size of them, and at the latest
// Delay after the first. It is safe for concurrent use.
type Batch[T any] struct {
	Size  int
	Delay time.Duration
	// Send gets the items in the order in which they came, and must not wait.
	Send func([]T)

	mu    sync.Mutex
	items []T
	timer *time.Timer // set while there are items
}

// Add gathers one more item.
func (b *Batch[T]) Add(item T) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.items = append(b.items, item)
	if len(b.items) >= b.Size {
		b.flush()
	} else if b.timer == nil {
		b.timer = time.AfterFunc(b.Delay, b.Flush)
	}
}

// Flush sends what there is.
func (b *Batch[T]) Flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.flush()
}

// flush is Flush for a caller that holds mu, so that batches keep their order.
func (b *Batch[T]) flush() {
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	if len(b.items) > 0 {
		b.Send(b.items)
		b.items = nil
	}
}
