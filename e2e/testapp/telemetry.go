package main

import (
	"errors"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploggrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/log"
	"go.opentelemetry.io/otel/propagation"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/trace"
)

// sendTelemetry sends, in the trace of the request, the span "order", 1 for the counter "testapp.orders" and
// the log record "order taken".
func sendTelemetry(r *http.Request) (err error) {
	ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	traces, err := otlptracegrpc.New(ctx)
	if err != nil {
		return err
	}
	metrics, err := otlpmetricgrpc.New(ctx)
	if err != nil {
		return err
	}
	logs, err := otlploggrpc.New(ctx)
	if err != nil {
		return err
	}
	tracer := trace.NewTracerProvider(trace.WithBatcher(traces))
	meter := metric.NewMeterProvider(metric.WithReader(metric.NewPeriodicReader(metrics)))
	logger := sdklog.NewLoggerProvider(sdklog.WithProcessor(sdklog.NewBatchProcessor(logs)))
	// What is still to be sent goes now.
	defer func() { err = errors.Join(err, tracer.Shutdown(ctx), meter.Shutdown(ctx), logger.Shutdown(ctx)) }()

	ctx, span := tracer.Tracer("testapp").Start(ctx, "order")
	defer span.End()
	orders, err := meter.Meter("testapp").Int64Counter("testapp.orders")
	if err != nil {
		return err
	}
	orders.Add(ctx, 1)
	var record log.Record
	record.SetBody(attribute.StringValue("order taken"))
	logger.Logger("testapp").Emit(ctx, record)
	return nil
}
