/* The part of DPDK that is inline functions and macros, per burst.
 *
 * One call moves a burst: a call across languages costs what handling one
 * packet does, so there is none per packet. bindgen reads this file; the two
 * frame structures mirror the ABI's (ffi/dpdk-abi), which the driver asserts.
 */
#ifndef GENIE_DPDK_SHIM_H
#define GENIE_DPDK_SHIM_H

#include <stdbool.h>
#include <stdint.h>

#include <rte_config.h>
#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_flow.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>
#include <rte_memory.h>
#include <rte_mempool.h>
#include <rte_version.h>

enum { GENIE_BURST_MAX = 32, GENIE_MBUF_CACHE = 256 };

/* A received frame: see RxFrame of the ABI. */
struct genie_rx_frame {
	struct rte_mbuf *mbuf;
	const uint8_t *data;
	uint32_t data_len;
	uint32_t frame_len;
	const uint8_t *payload;
	uint32_t payload_len;
	uint32_t reserved;
};

/* A frame to send: see TxFrame of the ABI. */
struct genie_tx_frame {
	const uint8_t *head;
	const uint8_t *payload;
	uint32_t head_len;
	uint32_t payload_len;
	uint32_t attachment;
	uint32_t reserved;
};

/* Memory that frames may refer to; free while `len` is 0. */
struct genie_attachment {
	const uint8_t *base;
	uint64_t len;
	/* Counts the packet buffers that refer to it, and its owner. */
	struct rte_mbuf_ext_shared_info shinfo;
};

/* How frames are put into packet buffers. */
struct genie_tx_mode {
	/* Packet buffers for heads and whole frames. */
	struct rte_mempool *pool;
	struct genie_attachment *attachments;
	uint32_t attachment_count;
	/* The longest frame in bytes. */
	uint32_t max_frame;
	/* False: payloads are copied behind the head. */
	bool external;
};

/* What genie_tx_build did besides making packet buffers. */
struct genie_tx_built {
	/* Payload bytes copied. */
	uint64_t copied_bytes;
	/* Frames at the front of the input that are in the output or in `bad`. */
	uint32_t taken;
	/* Packet buffers (heads of chains) written to the output. */
	uint32_t built;
	/* Frames taken that are too long, or whose payload is not in attached
	 * memory. */
	uint32_t bad;
};

/* Receives up to GENIE_BURST_MAX frames and describes them. A frame in several
 * segments is made one where the first has room for it, unless they are to be
 * kept: then two are described as they are, and not read. */
uint16_t genie_rx_burst(uint16_t port, uint16_t queue, struct genie_rx_frame *frames, uint16_t n,
			bool keep_segments);

/* Frees received frames. */
void genie_rx_free(const struct genie_rx_frame *frames, uint32_t n);

/* Makes packet buffers of up to GENIE_BURST_MAX frames. Takes fewer frames than
 * given when the pool runs out; leaves nothing allocated that is not in `out`. */
struct genie_tx_built genie_tx_build(const struct genie_tx_mode *mode,
				     const struct genie_tx_frame *frames, uint32_t n,
				     struct rte_mbuf **out);

/* Offers packet buffers to the ring; returns how many of the first it took. */
uint16_t genie_tx_send(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);

/* Prepares an attachment with one reference, which is its owner's and never
 * dropped; counts references. */
void genie_attachment_init(struct genie_attachment *attachment, const uint8_t *base, uint64_t len);
uint16_t genie_attachment_refs(const struct genie_attachment *attachment);

/* Asks a started port to deliver datagrams to this UDP port, over IPv4 and IPv6,
 * to one of its queues, until it is closed. 0, or a negative errno. */
int genie_flow_udp_port(uint16_t port, uint16_t queue, uint16_t udp_port);

/* Per-thread values that DPDK has as macros. */
int genie_errno(void);
unsigned int genie_lcore_id(void);

/* Offload bits, macros that bindgen cannot read. */
struct genie_offloads {
	uint64_t tx_multi_segs, tx_ipv4_cksum, tx_udp_cksum, rx_udp_cksum, rx_buffer_split,
		rx_scatter;
};
struct genie_offloads genie_offloads(void);

enum {
	GENIE_LCORE_ID_ANY = LCORE_ID_ANY,
	GENIE_PKTMBUF_HEADROOM = RTE_PKTMBUF_HEADROOM,
	/* Behind the UDP header of what Genie sends by default. */
	GENIE_PTYPE_UDP = RTE_PTYPE_L2_ETHER | RTE_PTYPE_L3_IPV6 | RTE_PTYPE_L4_UDP,
	GENIE_DEV_INTR_LSC = RTE_ETH_DEV_INTR_LSC,
};

#endif
