#include "shim.h"

#include <string.h>

_Static_assert(sizeof(struct genie_rx_frame) == 40, "as in ffi/dpdk-abi");
_Static_assert(sizeof(struct genie_tx_frame) == 32, "as in ffi/dpdk-abi");
_Static_assert(RTE_PKTMBUF_HEADROOM <= 1024, "the driver's buffer size allows for it");

uint16_t genie_rx_burst(uint16_t port, uint16_t queue, struct genie_rx_frame *frames, uint16_t n,
			bool keep_segments)
{
	struct rte_mbuf *mbufs[GENIE_BURST_MAX];

	n = rte_eth_rx_burst(port, queue, mbufs, RTE_MIN(n, (uint16_t)GENIE_BURST_MAX));
	for (uint16_t i = 0; i < n; i++) {
		struct rte_mbuf *m = mbufs[i];

		const struct rte_mbuf *apart = NULL;

		if (keep_segments) {
			if (m->nb_segs == 2)
				apart = m->next;
		} else if (unlikely(m->nb_segs > 1)) {
			/* Where it fails the frame stays as it is, and is
			 * recognised by data_len < frame_len. */
			(void)rte_pktmbuf_linearize(m);
		}
		frames[i] = (struct genie_rx_frame){
			.mbuf = m,
			.data = rte_pktmbuf_mtod(m, const uint8_t *),
			.data_len = m->data_len,
			.frame_len = m->pkt_len,
			/* Only the address: the bytes may be a GPU's. */
			.payload = apart ? rte_pktmbuf_mtod(apart, const uint8_t *) : NULL,
			.payload_len = apart ? apart->data_len : 0,
		};
	}
	return n;
}

void genie_rx_free(const struct genie_rx_frame *frames, uint32_t n)
{
	struct rte_mbuf *mbufs[GENIE_BURST_MAX];

	n = RTE_MIN(n, (uint32_t)GENIE_BURST_MAX);
	for (uint32_t i = 0; i < n; i++)
		mbufs[i] = frames[i].mbuf;
	rte_pktmbuf_free_bulk(mbufs, n);
}

/* Whether the frame needs a packet buffer of its own for the payload. */
static inline bool in_two(const struct genie_tx_mode *mode, const struct genie_tx_frame *f)
{
	return mode->external && f->payload_len > 0;
}

/* Whether the frame fits and its payload lies in attached memory. */
static inline bool is_sound(const struct genie_tx_mode *mode, const struct genie_tx_frame *f,
			    uint32_t room)
{
	const struct genie_attachment *a;
	uint64_t inside = f->head_len, offset;

	if (f->payload_len > 0) {
		if (f->attachment >= mode->attachment_count || f->payload_len > UINT16_MAX)
			return false;
		a = &mode->attachments[f->attachment];
		offset = (uint64_t)((uintptr_t)f->payload - (uintptr_t)a->base);
		if (offset > a->len || f->payload_len > a->len - offset)
			return false;
		if (!mode->external)
			inside += f->payload_len;
	}
	return f->head_len > 0 && inside <= room &&
	       (uint64_t)f->head_len + f->payload_len <= mode->max_frame;
}

static uint32_t mbufs_of(const struct genie_tx_mode *mode, const struct genie_tx_frame *frames,
			 uint32_t n)
{
	uint32_t count = n;

	for (uint32_t i = 0; i < n; i++)
		count += in_two(mode, &frames[i]);
	return count;
}

/* The IOVA is the address: the EAL runs in that mode. */
static inline void refer(struct rte_mbuf *m, const struct genie_tx_frame *f,
			 struct rte_mbuf_ext_shared_info *shinfo)
{
	rte_mbuf_ext_refcnt_update(shinfo, 1);
	rte_pktmbuf_attach_extbuf(m, (void *)(uintptr_t)f->payload,
				  (rte_iova_t)(uintptr_t)f->payload, (uint16_t)f->payload_len,
				  shinfo);
	m->data_len = (uint16_t)f->payload_len;
	m->pkt_len = f->payload_len;
}

struct genie_tx_built genie_tx_build(const struct genie_tx_mode *mode,
				     const struct genie_tx_frame *frames, uint32_t n,
				     struct rte_mbuf **out)
{
	struct genie_tx_built built = {0};
	struct rte_mbuf *mbufs[2 * GENIE_BURST_MAX];
	uint32_t used = 0;

	n = RTE_MIN(n, (uint32_t)GENIE_BURST_MAX);
	/* A mempool gives all or nothing; when it is nearly empty, fewer frames
	 * are better than none. */
	while (n > 0 && rte_pktmbuf_alloc_bulk(mode->pool, mbufs, mbufs_of(mode, frames, n)) != 0)
		n /= 2;
	for (uint32_t i = 0; i < n; i++) {
		const struct genie_tx_frame *f = &frames[i];
		struct rte_mbuf *m = mbufs[used++];
		struct rte_mbuf *x = in_two(mode, f) ? mbufs[used++] : NULL;
		uint8_t *at = rte_pktmbuf_mtod(m, uint8_t *);

		built.taken++;
		if (unlikely(!is_sound(mode, f, rte_pktmbuf_tailroom(m)))) {
			built.bad++;
			rte_pktmbuf_free(m);
			rte_pktmbuf_free(x);
			continue;
		}
		memcpy(at, f->head, f->head_len);
		m->data_len = (uint16_t)f->head_len;
		m->pkt_len = f->head_len;
		if (x != NULL) {
			refer(x, f, &mode->attachments[f->attachment].shinfo);
			m->next = x;
			m->nb_segs = 2;
			m->pkt_len += f->payload_len;
		} else if (f->payload_len > 0) {
			memcpy(at + f->head_len, f->payload, f->payload_len);
			m->data_len = (uint16_t)(f->head_len + f->payload_len);
			m->pkt_len = m->data_len;
			built.copied_bytes += f->payload_len;
		}
		out[built.built++] = m;
	}
	return built;
}

uint16_t genie_tx_send(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_tx_burst(port, queue, mbufs, n);
}

/* The owner keeps a reference of its own, so the count never falls to zero and
 * this is never called; DPDK wants it not null. */
static void never_last(void *addr, void *opaque)
{
	(void)addr;
	(void)opaque;
}

void genie_attachment_init(struct genie_attachment *attachment, const uint8_t *base, uint64_t len)
{
	attachment->base = base;
	attachment->len = len;
	attachment->shinfo.free_cb = never_last;
	attachment->shinfo.fcb_opaque = NULL;
	rte_mbuf_ext_refcnt_set(&attachment->shinfo, 1);
}

uint16_t genie_attachment_refs(const struct genie_attachment *attachment)
{
	return rte_mbuf_ext_refcnt_read(&attachment->shinfo);
}

int genie_flow_udp_port(uint16_t port, uint16_t queue, uint16_t udp_port)
{
	static const enum rte_flow_item_type ips[] = {
		RTE_FLOW_ITEM_TYPE_IPV4,
		RTE_FLOW_ITEM_TYPE_IPV6,
	};
	const struct rte_flow_attr attr = {.ingress = 1};
	const struct rte_flow_item_udp spec = {.hdr.dst_port = rte_cpu_to_be_16(udp_port)};
	const struct rte_flow_item_udp mask = {.hdr.dst_port = RTE_BE16(0xffff)};
	const struct rte_flow_action_queue to = {.index = queue};
	const struct rte_flow_action actions[] = {
		{.type = RTE_FLOW_ACTION_TYPE_QUEUE, .conf = &to},
		{.type = RTE_FLOW_ACTION_TYPE_END},
	};

	for (unsigned int i = 0; i < RTE_DIM(ips); i++) {
		const struct rte_flow_item pattern[] = {
			{.type = RTE_FLOW_ITEM_TYPE_ETH},
			{.type = ips[i]},
			{.type = RTE_FLOW_ITEM_TYPE_UDP, .spec = &spec, .mask = &mask},
			{.type = RTE_FLOW_ITEM_TYPE_END},
		};
		struct rte_flow_error error = {0};

		if (rte_flow_create(port, &attr, pattern, actions, &error) == NULL)
			return rte_errno > 0 ? -rte_errno : -ENOTSUP;
	}
	return 0;
}

int genie_errno(void)
{
	return rte_errno;
}

unsigned int genie_lcore_id(void)
{
	return rte_lcore_id();
}

struct genie_offloads genie_offloads(void)
{
	return (struct genie_offloads){
		.tx_multi_segs = RTE_ETH_TX_OFFLOAD_MULTI_SEGS,
		.tx_ipv4_cksum = RTE_ETH_TX_OFFLOAD_IPV4_CKSUM,
		.tx_udp_cksum = RTE_ETH_TX_OFFLOAD_UDP_CKSUM,
		.rx_udp_cksum = RTE_ETH_RX_OFFLOAD_UDP_CKSUM,
		.rx_buffer_split = RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT,
		.rx_scatter = RTE_ETH_RX_OFFLOAD_SCATTER,
	};
}
