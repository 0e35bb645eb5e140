package main

import (
	"context"
	"slices"
	"testing"
	"time"
)

// BenchmarkScenarioWaiting: what a million deliveries that wait in the retry queue cost those that are new. Two servers, with a thousand waiting and with a million,
// drain a backlog in turns; the median of the pairs counts.
func BenchmarkScenarioWaiting(b *testing.B) {
	const pairs = 11
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
		few, many := newTenants(ctx, b, 1), newTenants(ctx, b, 1)
		few.wait(b, 1000)
		many.wait(b, 1_000_000)
		turns := []*tenants{few, many}
		var ratios, singles []float64
		for range pairs {
			of := make(map[*tenants]float64)
			for _, t := range turns {
				_, of[t], _ = t.drain(ctx, b)
			}
			slices.Reverse(turns)
			ratios, singles = append(ratios, of[many]/of[few]), append(singles, of[few])
			b.Logf("%.0f %.0f %.3f", of[few], of[many], of[many]/of[few])
		}
		cancel()
		b.ReportMetric(median(ratios), "ratio")
		b.ReportMetric(median(singles), "few/s")
		b.ReportMetric(ratios[pairs/4], "quarter") // sorted by now
		b.ReportMetric(ratios[pairs-1-pairs/4], "three-quarters")
	}
}

// wait makes n deliveries to an endpoint of its own wait for hours.
func (t *tenants) wait(b *testing.B, n int) {
	b.Helper()
	s := t.names[0]
	t.exec(b, `INSERT INTO `+s+`.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id) VALUES ('waiting', 'http://127.0.0.1:9/', 'secret', gen_random_uuid())`)
	const part = 50_000
	for done := 0; done < n; done += part {
		t.exec(b, `INSERT INTO `+s+`.webhook_deliveries (webhook_event_id, webhook_endpoint_id, attempt_number, delivery_status, request_url, request_method, request_headers,
				request_body, response_status_code, response_time_ms, error_message, error_code, next_retry_at, relayed)
			SELECT gen_random_uuid(), id, 1, 'retrying', endpoint_url, 'POST', '{"content-type": "application/json"}',
				jsonb_build_object('id', gen_random_uuid(), 'type', 'x', 'timestamp', now(), 'data', jsonb_build_object('n', i, 'note', repeat('x', 200)))::text,
				503, 1, 'status 503', 'http_5xx', now() + interval '1 day', true
			FROM `+s+`.webhook_endpoints, generate_series(1, $1::int) i WHERE name = 'waiting'`, min(part, n-done))
	}
	t.exec(b, `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT d.id, '`+s+`', e.id, now() + (1 + random()) * interval '6 hours'
		FROM `+s+`.webhook_deliveries d JOIN `+s+`.webhook_endpoints e ON e.id = d.webhook_endpoint_id WHERE e.name = 'waiting'`)
	for _, sql := range []string{"VACUUM ANALYZE " + s + ".webhook_deliveries", "VACUUM ANALYZE outbox_relay.retry_queue", "CHECKPOINT"} {
		t.exec(b, sql)
	}
}
