package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
	"github.com/stretchr/testify/require"
)

// networkFaults are the scenarios of what lies between a relay and its server.
func networkFaults() []*scenario {
	toxic := func(name string, attributes func(r *faultRun) string) *scenario {
		return &scenario{name: "network-" + name, row: "network", run: func(r *faultRun) { r.poison(name, attributes) }}
	}
	return []*scenario{
		toxic("latency", func(r *faultRun) string {
			return fmt.Sprintf(`{"latency": %d, "jitter": %d}`, 5+r.rnd.IntN(100), r.rnd.IntN(50))
		}),
		toxic("bandwidth", func(r *faultRun) string { return fmt.Sprintf(`{"rate": %d}`, 20+r.rnd.IntN(200)) }),
		toxic("slicer", func(r *faultRun) string {
			return fmt.Sprintf(`{"average_size": %d, "size_variation": 10, "delay": %d}`, 16+r.rnd.IntN(100), r.rnd.IntN(200))
		}),
		toxic("limit_data", func(r *faultRun) string { return fmt.Sprintf(`{"bytes": %d}`, 1000+r.rnd.IntN(60_000)) }),
		toxic("reset_peer", func(r *faultRun) string { return fmt.Sprintf(`{"timeout": %d}`, r.rnd.IntN(300)) }),
		{name: "half-open", row: "true half-open", server: map[string]string{"wal_sender_timeout": "2s"}, run: halfOpen},
	}
}

// address is that of the server of the run.
func (r *faultRun) address() string {
	return fmt.Sprintf("127.0.0.1:%d", r.pool.Config().ConnConfig.Port)
}

// proxy starts one to the server of the run.
func (r *faultRun) proxy() *toxiproxy.Proxy {
	zerolog.SetGlobalLevel(zerolog.Disabled) // some of it does not ask its own logger
	proxy := toxiproxy.NewProxy(toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()), "server", "127.0.0.1:0", r.address())
	require.NoError(r.t, proxy.Start())
	r.t.Cleanup(proxy.Stop)
	return proxy
}

// behind writes a configuration for relays that reach the server at another address.
func (r *faultRun) behind(address string) (config string) {
	yaml, err := os.ReadFile(r.config)
	require.NoError(r.t, err)
	config = strings.TrimSuffix(r.config, ".yaml") + "-behind.yaml"
	require.NoError(r.t, os.WriteFile(config, []byte(strings.ReplaceAll(string(yaml), r.address(), address)), 0o600))
	return config
}

// poison puts a toxic between relay and server, in one direction or both, for a while, over and over.
func (r *faultRun) poison(kind string, attributes func(r *faultRun) string) {
	proxy := r.proxy()
	r.config = r.behind(proxy.Listen)
	r.lead()
	r.slack += held // what is sent while nothing can be recorded outlives its lease
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(50))
		end := r.interrupting()
		streams := [][]string{{"upstream"}, {"downstream"}, {"upstream", "downstream"}}[r.rnd.IntN(3)]
		for _, stream := range streams {
			_, err := proxy.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(`{"name": %q, "type": %q, "stream": %q, "attributes": %s}`, stream, kind, stream, attributes(r))))
			require.NoError(r.t, err)
		}
		began := r.front.requests()
		patience := time.Now().Add(time.Duration(500+r.rnd.IntN(1500)) * time.Millisecond)
		r.await("requests meanwhile", func() bool { return r.front.requests() > began+200 || time.Now().After(patience) })
		proxy.Toxics.ResetToxics(r.ctx)
		end()
		r.recover(20 * time.Second)
	}
	r.more(20)
}

// halfOpen freezes the way of the leader to the server, in both directions, without a word to either. Another relay takes over, and the frozen one has
// stopped sending by then.
func halfOpen(r *faultRun) {
	proxy, address := r.frozenProxy()
	direct := r.config
	r.config = r.behind(address)
	first := r.lead()
	r.config = direct
	second := r.start()
	r.await("the second relay to stand by", func() bool { return strings.Contains(second.said(r.t), "standing by") })
	r.more(20 + r.rnd.IntN(50))
	end := r.interrupting()
	require.NoError(r.t, proxy.Process.Signal(syscall.SIGSTOP))
	r.over()
	r.leads(second)
	end() // the first one has stopped sending by now, but for what it had claimed of the retry queue
	r.slack += 2 * 50
	r.recovery(&r.result.takeovers, 4*time.Second)
	r.more(20)
	require.NoError(r.t, proxy.Process.Signal(syscall.SIGCONT))
	r.await("the first relay to stand by", func() bool { return strings.Contains(first.said(r.t), "standing by") })
	r.recover(10 * time.Second)
	r.more(20)
}

// proxyVariable makes a test binary a proxy to the address that it names.
const proxyVariable = "OUTBOX_RELAY_TEST_PROXY"

// frozenProxy starts a process that passes connections on to the server, to be stopped and continued by signals.
func (r *faultRun) frozenProxy() (cmd *exec.Cmd, address string) {
	self, err := os.Executable()
	require.NoError(r.t, err)
	cmd = exec.Command(self) //nolint:noctx // ended by the test
	cmd.Env = append(os.Environ(), proxyVariable+"="+r.address())
	out, err := cmd.StdoutPipe()
	require.NoError(r.t, err)
	require.NoError(r.t, cmd.Start())
	r.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	address, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(r.t, err)
	return cmd, strings.TrimSpace(address)
}

// proxied passes connections on instead of running tests, if this process was started for that. It ends when it is killed.
func proxied() bool {
	target := os.Getenv(proxyVariable)
	if target == "" {
		return false
	}
	ctx := context.Background()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return true
	}
	_, _ = fmt.Fprintln(os.Stdout, listener.Addr())
	for {
		near, err := listener.Accept()
		if err != nil {
			return true
		}
		far, err := new(net.Dialer).DialContext(ctx, "tcp", target)
		if err != nil {
			_ = near.Close()
			continue
		}
		pass := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			_, _ = to.Close(), from.Close()
		}
		go pass(near, far)
		go pass(far, near)
	}
}
