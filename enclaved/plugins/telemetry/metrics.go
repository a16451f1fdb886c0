package telemetry

import (
	"slices"
	"time"

	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
)

// bounds of http.server.request.duration in seconds (semantic conventions, HTTP metrics).
var bounds = []float64{0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}

// series are the attributes of one time series of requests.
type series struct {
	method, protocol string
	port             uint32
	status           int
}

// histogram counts since the start. Each bucket keeps its latest request of a trace as an exemplar.
type histogram struct {
	counts    []uint64
	exemplars []*metrics.Exemplar
	count     uint64
	sum       float64
}

func newHistogram() *histogram {
	return &histogram{counts: make([]uint64, len(bounds)+1), exemplars: make([]*metrics.Exemplar, len(bounds)+1)}
}

func (h *histogram) observe(now time.Time, seconds float64, place traceContext) {
	i, _ := slices.BinarySearch(bounds, seconds) // bounds are inclusive
	h.counts[i]++
	h.count++
	h.sum += seconds
	if place.sampled {
		h.exemplars[i] = &metrics.Exemplar{
			TimeUnixNano: uint64(now.UnixNano()), TraceId: place.trace[:], SpanId: place.span[:],
			Value: &metrics.Exemplar_AsDouble{AsDouble: seconds},
		}
	}
}

// requests returns the histogram of durations, nil before the first request.
func (p *Plugin) requests(now uint64) *metrics.Metric {
	p.mu.Lock()
	defer p.mu.Unlock()
	var points []*metrics.HistogramDataPoint
	for s, h := range p.durations {
		sum := h.sum
		points = append(points, &metrics.HistogramDataPoint{
			Attributes: s.attributes(), StartTimeUnixNano: p.start, TimeUnixNano: now,
			Count: h.count, Sum: &sum, BucketCounts: slices.Clone(h.counts), ExplicitBounds: bounds,
			Exemplars: slices.DeleteFunc(slices.Clone(h.exemplars), func(e *metrics.Exemplar) bool { return e == nil }),
		})
	}
	if points == nil {
		return nil
	}
	return &metrics.Metric{
		Name: "http.server.request.duration", Unit: "s", Description: "Duration of requests to the workload.",
		Data: &metrics.Metric_Histogram{Histogram: &metrics.Histogram{
			AggregationTemporality: metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE, DataPoints: points,
		}},
	}
}

// point is a value of a counter, of a signal or of none.
type point struct {
	value  uint64
	signal string
}

func (p *Plugin) counter(name, unit, description string, now uint64, points ...point) *metrics.Metric {
	sum := &metrics.Sum{AggregationTemporality: metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE, IsMonotonic: true}
	for _, v := range points {
		d := &metrics.NumberDataPoint{StartTimeUnixNano: p.start, TimeUnixNano: now, Value: &metrics.NumberDataPoint_AsInt{AsInt: int64(v.value)}}
		if v.signal != "" {
			d.Attributes = []*common.KeyValue{text("signal", v.signal)}
		}
		sum.DataPoints = append(sum.DataPoints, d)
	}
	return &metrics.Metric{Name: name, Unit: unit, Description: description, Data: &metrics.Metric_Sum{Sum: sum}}
}

func (p *Plugin) seconds(name, description string, now uint64, value time.Duration) *metrics.Metric {
	return &metrics.Metric{Name: name, Unit: "s", Description: description, Data: &metrics.Metric_Sum{Sum: &metrics.Sum{
		AggregationTemporality: metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE, IsMonotonic: true,
		DataPoints: []*metrics.NumberDataPoint{{StartTimeUnixNano: p.start, TimeUnixNano: now, Value: &metrics.NumberDataPoint_AsDouble{AsDouble: value.Seconds()}}},
	}}}
}

func gauge(name, unit, description string, now, value uint64) *metrics.Metric {
	return &metrics.Metric{Name: name, Unit: unit, Description: description, Data: &metrics.Metric_Gauge{Gauge: &metrics.Gauge{
		DataPoints: []*metrics.NumberDataPoint{{TimeUnixNano: now, Value: &metrics.NumberDataPoint_AsInt{AsInt: int64(value)}}},
	}}}
}
