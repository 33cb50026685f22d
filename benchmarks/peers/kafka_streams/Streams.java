// Kafka Streams: input.mapValues(value -> value).to(output), with exactly_once_v2 or at_least_once.
//
// * It has no batches: commit.interval.ms is the job's "commit_interval_ms", 100 when it has none.
// * No state stores, so no cache. One stream thread: on two cores, which the broker needs too, a second made nothing faster.
// * producer.batch.size is 128 KiB: a fifth faster than its default of 16 KiB.
// * In the echo producer.linger.ms is 0 (Streams' own default is 100): a latency is measured there.
// * It ends when the offsets of all messages are committed. The processor of the last one asks for a commit at once.

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.ListConsumerGroupOffsetsOptions;
import org.apache.kafka.clients.admin.ListConsumerGroupOffsetsSpec;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.AppInfoParser;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.processor.api.ContextualFixedKeyProcessor;
import org.apache.kafka.streams.processor.api.FixedKeyRecord;

public final class Streams {
    private static final long BEGAN = System.nanoTime();
    private static final int DEFAULT_COMMIT_INTERVAL_MS = 100;
    private static final int BATCH_BYTES = 128 * 1024;
    private static final int ASK_COMMITTED_EVERY_MS = 2;
    private static final ObjectMapper JSON = new ObjectMapper();

    private static final AtomicLong HANDLED = new AtomicLong();
    private static volatile long first;

    /** Hands every record on as it is, and asks for a commit when the last one has come. More than asked for are dropped. */
    private static final class Copy extends ContextualFixedKeyProcessor<byte[], byte[], byte[]> {
        private final long messages;

        Copy(long messages) {
            this.messages = messages;
        }

        @Override
        public void process(FixedKeyRecord<byte[], byte[]> record) {
            if (first == 0) {
                first = System.nanoTime();
            }
            long handled = HANDLED.incrementAndGet();
            if (handled <= messages) {
                context().forward(record);
            }
            if (handled == messages) {
                context().commit();
            }
        }
    }

    public static void main(String[] args) throws Exception {
        JsonNode job = JSON.readTree(args[args.length - 1]);
        boolean echo = job.get("work").asText().equals("echo");
        long messages = job.get("messages").asLong();
        StreamsBuilder builder = new StreamsBuilder();
        builder.<byte[], byte[]>stream(job.get("input").asText())
                .processValues(() -> new Copy(messages))
                .to(job.get("output").asText());
        Path state = Files.createTempDirectory("kafka-streams-peer");
        KafkaStreams streams = new KafkaStreams(builder.build(), config(job, echo, state));
        if (echo) {
            streams.setStateListener((now, before) -> {
                if (now == KafkaStreams.State.RUNNING) {
                    System.out.println("ready");
                }
            });
        }
        streams.start();
        waitUntilCommitted(job, messages);
        long ended = System.nanoTime();
        System.out.println(result(streams, messages, ended));
        streams.close(Duration.ofSeconds(10));
        streams.cleanUp();
        Files.deleteIfExists(state.resolve(job.get("group").asText()));
        Files.deleteIfExists(state);
    }

    private static Properties config(JsonNode job, boolean echo, Path state) {
        String guarantee = job.path("guarantee").asText(job.get("work").asText());
        Properties config = new Properties();
        config.put(StreamsConfig.APPLICATION_ID_CONFIG, job.get("group").asText());
        config.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, job.get("bootstrap").asText());
        config.put(StreamsConfig.STATE_DIR_CONFIG, state.toString());
        config.put(
                StreamsConfig.PROCESSING_GUARANTEE_CONFIG,
                guarantee.equals("exactly-once") ? StreamsConfig.EXACTLY_ONCE_V2 : StreamsConfig.AT_LEAST_ONCE);
        config.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, job.path("commit_interval_ms").asInt(DEFAULT_COMMIT_INTERVAL_MS));
        config.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, 0);
        config.put(StreamsConfig.DEFAULT_KEY_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class);
        config.put(StreamsConfig.DEFAULT_VALUE_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class);
        config.put(StreamsConfig.producerPrefix(ProducerConfig.ACKS_CONFIG), "all");
        config.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), BATCH_BYTES);
        config.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        if (echo) {
            config.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), 0);
        }
        return config;
    }

    private static void waitUntilCommitted(JsonNode job, long messages) throws Exception {
        while (HANDLED.get() < messages) {
            Thread.sleep(1);
        }
        String group = job.get("group").asText();
        try (Admin admin = Admin.create(Map.of("bootstrap.servers", job.get("bootstrap").asText()))) {
            while (committed(admin, group) < messages) {
                Thread.sleep(ASK_COMMITTED_EVERY_MS);
            }
        }
    }

    /** How many messages are committed: the offsets of topics that begin at 0 and hold no markers. */
    private static long committed(Admin admin, String group) throws Exception {
        return admin
                .listConsumerGroupOffsets(
                        Map.of(group, new ListConsumerGroupOffsetsSpec()),
                        new ListConsumerGroupOffsetsOptions().requireStable(true))
                .partitionsToOffsetAndMetadata()
                .get()
                .values()
                .stream()
                .mapToLong(committed -> committed == null ? 0 : committed.offset())
                .sum();
    }

    private static String result(KafkaStreams streams, long messages, long ended) throws Exception {
        ObjectNode result = JSON.createObjectNode();
        result.put("messages", messages);
        result.put("seconds", (ended - first) / 1e9);
        result.put("transactions", commits(streams));
        result.put("first", (first - BEGAN) / 1e9);
        result.put("rss", peakRss());
        result.put("version", "Kafka Streams " + AppInfoParser.getVersion());
        return JSON.writeValueAsString(result);
    }

    private static long commits(KafkaStreams streams) {
        return (long) streams.metrics().entrySet().stream()
                .filter(metric -> metric.getKey().name().equals("commit-total"))
                .filter(metric -> metric.getKey().group().equals("stream-thread-metrics"))
                .mapToDouble(metric -> (double) metric.getValue().metricValue())
                .sum();
    }

    private static long peakRss() throws Exception {
        try (var lines = Files.lines(Path.of("/proc/self/status"))) {
            String peak = lines.filter(line -> line.startsWith("VmHWM:")).findFirst().orElseThrow();
            return Long.parseLong(peak.replaceAll("\\D", "")) * 1024;
        }
    }
}
