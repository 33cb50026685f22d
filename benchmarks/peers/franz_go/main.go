// franz-go, as its documentation and its own example of transactions do it: PollRecords, Produce with a promise,
// GroupTransactSession.
//
//   - No compression, as the other contestants (its default is snappy).
//   - MaxBufferedRecords is 100,000: with its default of 10,000 Produce waits for the brokers all the time.
//   - ProducerLinger is 0: its default of 10 ms is added to every batch that is waited for (transform is three times as fast).
//   - ConcurrentTransactionsBackoff is 2 ms: its default of 20 ms is what a transaction waits for the markers of the last one.
//   - A transaction has "batch" messages: PollRecords is called until there are that many.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	defaultBatch = 1000
	keys         = 500
	maxBuffered  = 100_000

	concurrentBackoff = 2 * time.Millisecond
)

var (
	began      = time.Now()
	background = context.Background()
)

type job struct {
	Work            string   `json:"work"`
	Bootstrap       string   `json:"bootstrap"`
	Input           string   `json:"input"`
	Output          string   `json:"output"`
	Messages        int      `json:"messages"`
	Size            int      `json:"size"`
	Batch           int      `json:"batch"`
	Group           string   `json:"group"`
	TransactionalID string   `json:"transactional_id"`
	Guarantee       string   `json:"guarantee"`
	Defaults        bool     `json:"defaults"` // of the three options above that are not: its own
}

type clock struct {
	first, since time.Time
	handled      int
	transactions int
}

func (c *clock) start() {
	if c.first.IsZero() {
		c.since = time.Now()
		c.first = c.since
	}
}

func (c *clock) left(j *job) int {
	return j.Messages - c.handled
}

func (c *clock) done() {
	result := map[string]any{
		"messages":     c.handled,
		"seconds":      time.Since(c.since).Seconds(),
		"transactions": nil,
		"first":        nil,
		"rss":          peakRSS(),
		"version":      "franz-go " + version(),
	}
	if !c.first.IsZero() {
		result["first"] = c.first.Sub(began).Seconds()
	}
	if c.transactions > 0 {
		result["transactions"] = c.transactions
	}
	line, err := json.Marshal(result)
	must(err)
	fmt.Println(string(line))
}

func main() {
	j := job{}
	must(json.Unmarshal([]byte(os.Args[len(os.Args)-1]), &j))
	if j.Batch == 0 {
		j.Batch = defaultBatch
	}
	c := &clock{}
	works := map[string]func(*job, *clock){
		"produce":      produce,
		"consume":      consume,
		"transform":    transform,
		"exactly-once": exactlyOnce,
		"echo":         echo,
	}
	works[j.Work](&j, c)
	c.done()
}

func produce(j *job, c *clock) {
	client := newClient(j)
	defer client.Close()
	value := bytes.Repeat([]byte("v"), j.Size)
	key := make([][]byte, keys)
	for i := range key {
		key[i] = fmt.Appendf(nil, "key-%04d", i)
	}
	must(client.ProduceSync(background, &kgo.Record{Key: key[0], Value: value}).FirstErr())
	c.start()
	outcomes := new(kgo.FirstErrPromise)
	for i := range j.Messages {
		client.Produce(background, &kgo.Record{Key: key[i%keys], Value: value}, outcomes.Promise())
	}
	must(outcomes.Err())
	c.handled = j.Messages
}

func consume(j *job, c *clock) {
	client := newClient(j, reading(j)...)
	defer client.Close()
	for c.left(j) > 0 {
		handle(client, c, min(j.Batch, c.left(j)), empty)
		must(client.CommitUncommittedOffsets(background))
	}
}

func empty(*kgo.Record) {}

func transform(j *job, c *clock) {
	client := newClient(j, reading(j)...)
	defer client.Close()
	for c.left(j) > 0 {
		outcomes := new(kgo.FirstErrPromise)
		copies := copyTo(client, outcomes)
		for wanted := min(j.Batch, c.left(j)); wanted > 0; {
			wanted -= handle(client, c, wanted, copies)
		}
		must(outcomes.Err())
		must(client.CommitUncommittedOffsets(background))
	}
}

func exactlyOnce(j *job, c *clock) {
	session := newSession(j)
	defer session.Close()
	for c.left(j) > 0 {
		transact(session, c, min(j.Batch, c.left(j)), true)
	}
}

// transact is one transaction of what one poll gives or, to fill a batch, of what as many polls give as it takes.
func transact(session *kgo.GroupTransactSession, c *clock, wanted int, fill bool) {
	fetches := pollRecords(session, wanted)
	if fetches.NumRecords() == 0 {
		return
	}
	c.start()
	must(session.Begin())
	outcomes := kgo.AbortingFirstErrPromise(session.Client())
	copies := copyTo(session, outcomes)
	for {
		fetches.EachRecord(copies)
		c.handled += fetches.NumRecords()
		wanted -= fetches.NumRecords()
		if wanted <= 0 || !fill {
			break
		}
		fetches = pollRecords(session, wanted)
	}
	committed, err := session.End(background, outcomes.Err() == nil)
	must(err)
	if !committed {
		log.Fatal("aborted: the group was rebalanced under a benchmark")
	}
	c.transactions++
}

func echo(j *job, c *clock) {
	options := []kgo.Opt{announcing()}
	if j.Guarantee == "exactly-once" {
		session := newSession(j, options...)
		defer session.Close()
		for c.left(j) > 0 {
			transact(session, c, j.Batch, false)
		}
		return
	}
	options = append(options, reading(j)...)
	if j.Guarantee == "at-most-once" {
		options = append(options, kgo.RequiredAcks(kgo.NoAck()), kgo.DisableIdempotentWrite())
	}
	client := newClient(j, options...)
	defer client.Close()
	for c.left(j) > 0 {
		echoOnce(client, j, c)
	}
}

func echoOnce(client *kgo.Client, j *job, c *clock) {
	fetches := pollRecords(client, j.Batch)
	if fetches.NumRecords() == 0 {
		return
	}
	c.start()
	if j.Guarantee == "at-most-once" {
		must(client.CommitUncommittedOffsets(background))
	}
	outcomes := new(kgo.FirstErrPromise)
	fetches.EachRecord(copyTo(client, outcomes))
	must(outcomes.Err())
	if j.Guarantee == "at-least-once" {
		must(client.CommitUncommittedOffsets(background))
	}
	c.handled += fetches.NumRecords()
}

type poller interface {
	PollRecords(context.Context, int) kgo.Fetches
}

func pollRecords(from poller, wanted int) kgo.Fetches {
	fetches := from.PollRecords(background, wanted)
	for _, failed := range fetches.Errors() {
		log.Fatal(failed)
	}
	return fetches
}

// handle hands up to wanted records to a function and says how many there were.
func handle(client *kgo.Client, c *clock, wanted int, each func(*kgo.Record)) int {
	fetches := pollRecords(client, wanted)
	if fetches.NumRecords() > 0 {
		c.start()
	}
	fetches.EachRecord(each)
	c.handled += fetches.NumRecords()
	return fetches.NumRecords()
}

type producer interface {
	Produce(context.Context, *kgo.Record, func(*kgo.Record, error))
}

func copyTo(to producer, outcomes *kgo.FirstErrPromise) func(*kgo.Record) {
	return func(r *kgo.Record) {
		to.Produce(background, &kgo.Record{Key: r.Key, Value: r.Value}, outcomes.Promise())
	}
}

func newClient(j *job, options ...kgo.Opt) *kgo.Client {
	client, err := kgo.NewClient(append(common(j), options...)...)
	must(err)
	return client
}

func newSession(j *job, options ...kgo.Opt) *kgo.GroupTransactSession {
	options = append(options, common(j)...)
	options = append(options, kgo.ConsumerGroup(j.Group), kgo.ConsumeTopics(j.Input))
	options = append(options, kgo.TransactionalID(j.TransactionalID), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	session, err := kgo.NewGroupTransactSession(append(options, kgo.RequireStableFetchOffsets())...)
	must(err)
	return session
}

func common(j *job) []kgo.Opt {
	options := []kgo.Opt{
		kgo.SeedBrokers(strings.Split(j.Bootstrap, ",")...),
		kgo.DefaultProduceTopic(j.Output),
		kgo.ProducerBatchCompression(kgo.NoCompression()),
	}
	if j.Defaults {
		return options
	}
	return append(
		options,
		kgo.MaxBufferedRecords(maxBuffered),
		kgo.ProducerLinger(0),
		kgo.ConcurrentTransactionsBackoff(concurrentBackoff),
	)
}

func reading(j *job) []kgo.Opt {
	return []kgo.Opt{kgo.ConsumerGroup(j.Group), kgo.ConsumeTopics(j.Input), kgo.DisableAutoCommit()}
}

func announcing() kgo.Opt {
	return kgo.OnPartitionsAssigned(func(_ context.Context, _ *kgo.Client, assigned map[string][]int32) {
		if len(assigned) > 0 {
			fmt.Println("ready")
		}
	})
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dependency := range info.Deps {
			if dependency.Path == "github.com/twmb/franz-go" {
				return dependency.Version
			}
		}
	}
	return "?"
}

func peakRSS() int {
	status, err := os.ReadFile("/proc/self/status")
	must(err)
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kilobytes, err := strconv.Atoi(strings.Fields(after)[0])
	must(err)
	return kilobytes * 1024
}
